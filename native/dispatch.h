#pragma once

#include "kernels.h"

namespace blockffn {

const Kernels& kernels();

}  // namespace blockffn
