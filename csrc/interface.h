// What a compiled module and the Python code beside it must agree on: rlkernels/backends/gate.py holds the same text, and refuses a module that
// holds another. The package's version, and a number to raise with every change of what crosses, or of what a kernel makes of it.
#pragma once

namespace rlk {

constexpr const char* kInterface = "0.1.0/3";

}  // namespace rlk
