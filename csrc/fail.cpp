// Errors of kernels' arguments. A file of its own, compiled for the baseline only and into either module.
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

#include "view.h"

namespace mwm {

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw std::invalid_argument(text);
}

}  // namespace mwm
