"""The run of a whole machine with a GPU: build, tests, checkers and benchmarks."""
