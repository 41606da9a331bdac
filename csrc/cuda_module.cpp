// Python binding of the CUDA kernels. It needs no driver to be imported: nothing runs before the first launch.
#include "casters.h"
#include "ops_cuda.h"

#ifdef MWM_EMULATE
#include "emulate.h"
#endif

namespace py = pybind11;

namespace {

template <class... Arguments>
void bind(py::module_& module, const char* name, void (*function)(Arguments...)) {
  module.def(name, [function](std::decay_t<Arguments>... arguments) {
    py::gil_scoped_release released;
    function(arguments...);
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of mwm. Use them through mwm.ops, which checks and allocates.";
#define MWM_BIND(name, arguments) bind(module, #name, &mwm::cuda::name);
  MWM_CUDA_KERNELS(MWM_BIND)
#undef MWM_BIND
#ifdef MWM_EMULATE
  module.def("set_order", [](int order) { emulate::order = order; });
#endif
}
