// The table of one instruction set.
#include "isa.h"

namespace mwm {
namespace MWM_ISA {

#define MWM_ENTRY(name, arguments) &name,
extern const Kernels kKernels;
const Kernels kKernels = {MWM_KERNELS(MWM_ENTRY)};
#undef MWM_ENTRY

}  // namespace MWM_ISA
}  // namespace mwm
