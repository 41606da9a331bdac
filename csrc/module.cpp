// Python binding. Every kernel of ops.h is bound by the list there; the GIL is released while one runs.
#include <type_traits>

#include "casters.h"
#include "ops.h"
#include "parallel.h"

namespace py = pybind11;

#ifdef MWM_SANITIZE
namespace mwm {
bool run_known_bad(const char* name, const View& x, const View& out);  // tests/sanitize/known_bad.cpp
}
#endif

namespace {

template <class... Arguments>
void bind(py::module_& module, const char* name, void (*mwm::Kernels::*member)(Arguments...)) {
  module.def(name, [member](std::decay_t<Arguments>... arguments) {
    py::gil_scoped_release released;
    (mwm::kernels().*member)(arguments...);
  });
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native kernels of mwm. Use them through mwm.ops, which checks and allocates.";
#define MWM_BIND(name, arguments) bind(module, #name, &mwm::Kernels::name);
  MWM_KERNELS(MWM_BIND)
#undef MWM_BIND
  module.def("isa", [] { return mwm::isa(); });
  module.def("isas", [] {
    py::list names;
    for (int i = 0; mwm::available_isa(i); ++i) names.append(mwm::available_isa(i));
    return names;
  });
  module.def("set_isa", [](const char* name) { return mwm::set_isa(name); });
  module.def("thread_runtime", [] { return mwm::thread_runtime(); });
  module.def("set_thread_runtime", [](const char* name) { return mwm::set_thread_runtime(name); });
#ifdef MWM_SANITIZE
  module.def("known_bad", [](const char* name, const mwm::View& x, const mwm::View& out) { return mwm::run_known_bad(name, x, out); });
#endif
  mwm::thread_runtime();  // Looks the OpenMP runtime up now, after torch and before any fork.
}
