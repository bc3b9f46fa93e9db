// The addresses of tensors that are as a kernel assumes. This is the quick half of rlkernels/backends/gate.py, which
// says what is wrong with a tensor that is not. Tensors are asked through Python's C interface, because that needs no
// header of torch. A question costs a twentieth of a microsecond here and a tenth in Python.
#pragma once
#include <pybind11/pybind11.h>

namespace rlk {
namespace tensors {

// The types of torch's own tensors, set once when the backend's module is imported, and the names of what is asked.
struct Known {
  PyTypeObject* kinds[2] = {};
  PyObject *dtype, *shape, *is_cpu, *device, *is_contiguous, *is_neg, *data_ptr;
};

inline Known& known() {
  static Known all = [] {
    Known k;
    k.dtype = PyUnicode_InternFromString("dtype"), k.shape = PyUnicode_InternFromString("shape"),
    k.is_cpu = PyUnicode_InternFromString("is_cpu");
    k.device = PyUnicode_InternFromString("device"), k.is_contiguous = PyUnicode_InternFromString("is_contiguous");
    k.is_neg = PyUnicode_InternFromString("is_neg"), k.data_ptr = PyUnicode_InternFromString("data_ptr");
    return k;
  }();
  return all;
}

using Owned = pybind11::object;
inline Owned owned(PyObject* x) { return pybind11::reinterpret_steal<Owned>(x); }
inline Owned ask(PyObject* x, PyObject* name) { return owned(PyObject_GetAttr(x, name)); }
inline bool says(PyObject* x, PyObject* method, PyObject* answer) {
  return owned(PyObject_CallMethodNoArgs(x, method)).ptr() == answer;
}
inline bool equal(const Owned& a, const Owned& b) {
  return a && b && PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ) == 1;
}

// (dtype, like, *tensors) -> their addresses, with 0 for None. Returns None where one of them is not a tensor of
// torch's own types, has another dtype, has another shape or device than `like`, is not contiguous, has a pending
// negation, or has elements and no memory.
inline PyObject* addresses(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const Known& k = known();
  PyObject *const dtype = arguments[0], *const like = arguments[1];
  const Owned shape = ask(like, k.shape), on_cpu = ask(like, k.is_cpu);
  Owned found = owned(PyTuple_New(count - 2));
  const auto address = [&](PyObject* x) -> PyObject* {
    if (x == Py_None) return PyLong_FromLong(0);
    if (Py_TYPE(x) != k.kinds[0] && Py_TYPE(x) != k.kinds[1]) return nullptr;
    if (ask(x, k.dtype).ptr() != dtype || !says(x, k.is_contiguous, Py_True) || !says(x, k.is_neg, Py_False))
      return nullptr;
    if (x != like) {
      if (ask(x, k.is_cpu).ptr() != on_cpu.ptr() || !equal(ask(x, k.shape), shape)) return nullptr;
      if (on_cpu.ptr() != Py_True && !equal(ask(x, k.device), ask(like, k.device))) return nullptr;
    }
    Owned at = owned(PyObject_CallMethodNoArgs(x, k.data_ptr));
    if (!at) return nullptr;
    if (PyObject_IsTrue(at.ptr()) == 0) {  // no memory is right for a tensor without elements
      const Owned elements = owned(PyObject_CallMethod(x, "numel", nullptr));
      if (!elements || PyObject_IsTrue(elements.ptr()) != 0) return nullptr;
    }
    return at.release().ptr();
  };
  for (Py_ssize_t i = 2; i < count && shape && on_cpu && found; ++i) {
    PyObject* const at = address(arguments[i]);
    if (!at)
      found = Owned();
    else
      PyTuple_SET_ITEM(found.ptr(), i - 2, at);
  }
  if (shape && on_cpu && found) return found.release().ptr();
  PyErr_Clear();  // because gate.py asks again and raises the error itself
  Py_RETURN_NONE;
}

inline void know(const pybind11::type& tensor, const pybind11::type& parameter) {
  known().kinds[0] = reinterpret_cast<PyTypeObject*>(tensor.ptr()),
  known().kinds[1] = reinterpret_cast<PyTypeObject*>(parameter.ptr());
}

inline void bind(pybind11::module_& m) {
  // Bound without pybind11, because a call through it costs as much as two tensors.
  static PyMethodDef definition{"addresses", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(addresses)),
                                METH_FASTCALL, nullptr};
  m.attr("addresses") = owned(PyCFunction_New(&definition, nullptr));
  m.def("know", &know);
}

}  // namespace tensors
}  // namespace rlk
