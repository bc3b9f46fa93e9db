// The text that a compiled module and the Python code beside it must agree on. rlkernels/backends/gate.py holds it too,
// and refuses a module that holds another. It is the version of the package and a number. The number rises with every
// change of the arguments that cross, or of what a kernel makes of them.
#pragma once

namespace rlk {

constexpr const char* kInterface = "0.1.0/4";

}  // namespace rlk
