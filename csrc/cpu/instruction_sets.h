// Which instruction sets this machine has, and the one in force: the newest, unless a test asks for another.
#pragma once

#include <string>

#include "kernels.h"

namespace svf {

// Kernels of the set in force. Throws where the machine has none of the sets.
const Kernels& kernels();
// Names of the sets that this machine has, newest first, by comma; empty where it has none.
std::string instruction_set_names();
// False where the machine has no set of that name.
bool use_instruction_set(const std::string& name);

}  // namespace svf
