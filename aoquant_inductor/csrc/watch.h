// Watch(refs, versions, pointers, storages, dtypes, places)() -> bool: whether any weight differs from its state so described.
// places: the two sizes, and then the two strides.
//
// refs: weak references to tensors. versions[i] is -1 for a tensor that counts none (an inference tensor). A dead reference
// counts as different: the caller asks again, slowly. About 12 ns per weight, where Python's attribute reads take 100.
#pragma once

#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace aoquant {

struct State {
  int64_t version;
  uintptr_t pointer;
  uintptr_t storage;  // whoever made the Watch refers to it: no other one has its address
  caffe2::TypeMeta dtype;
  int64_t places[4];
};

bool lies(at::IntArrayRef sizes, at::IntArrayRef strides, const int64_t* places) {
  if (sizes.size() != 2) return false;
  const int64_t *size = sizes.data(), *stride = strides.data();
  return size[0] == places[0] && size[1] == places[1] && stride[0] == places[2] && stride[1] == places[3];
}

struct Watch {
  PyObject_HEAD
  PyObject* refs;
  std::vector<State>* states;
  vectorcallfunc call;
};

PyObject* referent(PyObject* ref) {  // a new reference, or null when it is dead
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* object = nullptr;
  return PyWeakref_GetRef(ref, &object) == 1 ? object : nullptr;
#else
  PyObject* object = PyWeakref_GetObject(ref);
  if (object == nullptr || object == Py_None) return nullptr;
  return Py_NewRef(object);
#endif
}
bool differs(PyObject* object, const State& state) {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const int64_t version = impl->is_inference() ? -1 : (int64_t)impl->version_counter().current_version();
  if (version != state.version) return true;
  if (!impl->has_storage() || impl->layout() != at::kStrided || impl->dtype() != state.dtype) return true;
  if (!lies(impl->sizes(), impl->strides(), state.places)) return true;
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (reinterpret_cast<uintptr_t>(storage) != state.storage) return true;
  // no checks: the memory of a weight that was let go is null, and asking for it the usual way throws
  const auto* base = static_cast<const char*>(storage->_mutable_data_ptr_no_checks().get());
  return reinterpret_cast<uintptr_t>(base ? base + impl->storage_offset() * impl->itemsize() : nullptr) != state.pointer;
}

bool stale(const Watch* watch) {
  for (size_t i = 0; i < watch->states->size(); ++i) {
    PyObject* object = referent(PyTuple_GET_ITEM(watch->refs, (Py_ssize_t)i));
    if (object == nullptr) return true;
    const bool changed = !THPVariable_Check(object) || differs(object, (*watch->states)[i]);
    Py_DECREF(object);
    if (changed) return true;
  }
  return false;
}

PyObject* watch_call(PyObject* self, PyObject* const*, size_t, PyObject*) {
  return PyBool_FromLong(stale(reinterpret_cast<Watch*>(self)));
}

PyObject* watch_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject* refs;
  PyObject* lists[5];  // versions, pointers, storages, dtypes, places
  if (!PyArg_ParseTuple(args, "O!OOOOO", &PyTuple_Type, &refs, &lists[0], &lists[1], &lists[2], &lists[3], &lists[4])) {
    return nullptr;
  }
  const Py_ssize_t n = PyTuple_GET_SIZE(refs);
  for (PyObject* one : lists) {
    if (!PyList_Check(one) || PyList_GET_SIZE(one) != n) {
      PyErr_SetString(PyExc_ValueError, "Watch: its lists are one for each reference");
      return nullptr;
    }
  }
  std::vector<State> states(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    if (!PyWeakref_Check(PyTuple_GET_ITEM(refs, i))) {
      PyErr_SetString(PyExc_TypeError, "Watch: refs are weak references");
      return nullptr;
    }
    PyObject *dtype = PyList_GET_ITEM(lists[3], i), *places = PyList_GET_ITEM(lists[4], i);
    if (!THPDtype_Check(dtype) || !PyTuple_Check(places) || PyTuple_GET_SIZE(places) != 4) {
      PyErr_SetString(PyExc_TypeError, "Watch: dtypes are torch.dtype, places tuples of four");
      return nullptr;
    }
    states[i].version = PyLong_AsLongLong(PyList_GET_ITEM(lists[0], i));
    states[i].pointer = (uintptr_t)PyLong_AsUnsignedLongLong(PyList_GET_ITEM(lists[1], i));
    states[i].storage = (uintptr_t)PyLong_AsUnsignedLongLong(PyList_GET_ITEM(lists[2], i));
    states[i].dtype = caffe2::TypeMeta::fromScalarType(reinterpret_cast<THPDtype*>(dtype)->scalar_type);
    for (Py_ssize_t d = 0; d < 4; ++d) {
      states[i].places[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(places, d));
    }
  }
  if (PyErr_Occurred()) return nullptr;
  auto* watch = reinterpret_cast<Watch*>(type->tp_alloc(type, 0));
  if (watch == nullptr) return nullptr;
  watch->refs = Py_NewRef(refs);
  watch->states = new std::vector<State>(std::move(states));
  watch->call = watch_call;
  return reinterpret_cast<PyObject*>(watch);
}

void watch_dealloc(PyObject* self) {
  auto* watch = reinterpret_cast<Watch*>(self);
  delete watch->states;
  Py_XDECREF(watch->refs);
  Py_TYPE(self)->tp_free(self);
}

PyTypeObject watch_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

inline bool ready_watch() {
  watch_type.tp_name = "aoquant_watch.Watch";
  watch_type.tp_basicsize = sizeof(Watch);
  watch_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  watch_type.tp_vectorcall_offset = offsetof(Watch, call);
  watch_type.tp_call = PyVectorcall_Call;
  watch_type.tp_new = watch_new;
  watch_type.tp_dealloc = watch_dealloc;
  return PyType_Ready(&watch_type) == 0;
}

}  // namespace aoquant
