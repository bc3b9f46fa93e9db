"""Random calls of the public functions: valid ones against plain float64 torch, hostile ones against a crash.

    python tests/fuzz --kind valid --seeds 0 200                   # every case, seeds 0 to 199
    python tests/fuzz --kind hostile --seeds 0 2000 --case gae     # one case
    python tests/fuzz --kind valid --seeds 0 200 --sanitized       # the same with the native module under ASan and
    UBSan

A seed and the name of a case say everything about a call. Each range runs in a child process that writes where it is
before each call, so a crash is a finding like any other. A finding is printed with the command that repeats it; the
exit status is 1 where there was one.

``draws`` random values and layouts; ``trial`` one call and its verdict; ``rows``, ``policies``, ``heads``,
``preferences``, ``sequences``, ``advantages`` the cases; ``batches``, ``terms`` their truth; ``hostile`` the hostile
calls; ``ranges`` the child processes; ``sanitized`` the build; ``threads`` and ``races`` several threads at once.
"""
