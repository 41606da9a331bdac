// The convolution kernels' part of the list in ops.h.
#pragma once

#include "view.h"

#define MWM_CONV_KERNELS(X)
