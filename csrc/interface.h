// The text that a compiled module and the Python code beside it must agree on. rlkernels/backends/gate.py holds it too,
// and refuses a module that holds another. It is the release that the package is of or comes before, and a number. The
// number rises with every change of the arguments that cross, or of what a kernel makes of them.
#pragma once

namespace rlk {

constexpr const char* kInterface = "0.2.0/4";

}  // namespace rlk
