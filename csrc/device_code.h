// Marks of code that a CUDA compiler also makes for the GPU; nothing for other compilers.
#pragma once

#if defined(__CUDACC__)
#define MWM_DEVICE __device__
#else
#define MWM_DEVICE
#endif
