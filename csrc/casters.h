// How Python's tuples and lists become the arguments of kernels.
#pragma once

#include <pybind11/pybind11.h>

#include "view.h"

namespace pybind11::detail {

// (address, shape, strides, dtype code), or None.
template <>
struct type_caster<mwm::View> {
  PYBIND11_TYPE_CASTER(mwm::View, const_name("View"));

  bool load(handle source, bool) {
    if (source.is_none()) {
      value = mwm::View{};
      return true;
    }
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    PyObject* shape = PyTuple_GET_ITEM(source.ptr(), 1);
    PyObject* strides = PyTuple_GET_ITEM(source.ptr(), 2);
    if (!PyTuple_Check(shape) || !PyTuple_Check(strides) || PyTuple_GET_SIZE(shape) != PyTuple_GET_SIZE(strides)) return false;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.ndim = static_cast<int>(PyTuple_GET_SIZE(shape));
    if (value.ndim > mwm::kMaxDims) mwm::fail("a view has at most %d dimensions, got %d", mwm::kMaxDims, value.ndim);
    for (int i = 0; i < value.ndim; ++i) {
      value.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape, i));
      value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    value.dtype = static_cast<mwm::DType>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 3)));
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

template <>
struct type_caster<mwm::Ints> {
  PYBIND11_TYPE_CASTER(mwm::Ints, const_name("list[int]"));

  bool load(handle source, bool) {
    if (!PyList_Check(source.ptr())) return false;
    const Py_ssize_t count = PyList_GET_SIZE(source.ptr());
    if (count > mwm::kMaxInts) mwm::fail("a list has at most %d numbers, got %lld", mwm::kMaxInts, static_cast<long long>(count));
    value.count = static_cast<int>(count);
    for (Py_ssize_t i = 0; i < count; ++i) value.values[i] = PyLong_AsLongLong(PyList_GET_ITEM(source.ptr(), i));
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};

}  // namespace pybind11::detail
