// What runs at every call of a compiled graph: Watch (watch.h), Lookup (lookup.h).
//
// turn(): what any Lookup remembers counts no more; said when a weight's stamp changes anywhere.
//
// let_go(tensor, message): frees the tensor's memory; whatever reads or writes it later raises RuntimeError(message). Sizes,
// strides and the version stay: Dynamo's guards pass.
#include "lookup.h"

namespace {

PyObject* turn(PyObject*, PyObject*) {
  ++aoquant::generation;
  Py_RETURN_NONE;
}

PyObject* let_go(PyObject*, PyObject* args) {
  PyObject* object;
  const char* message;
  if (!PyArg_ParseTuple(args, "Os", &object, &message)) return nullptr;
  if (!THPVariable_Check(object) || !THPVariable_Unpack(object).has_storage()) {
    PyErr_SetString(PyExc_TypeError, "let_go: a tensor with memory is wanted");
    return nullptr;
  }
  c10::StorageImpl* impl = THPVariable_Unpack(object).unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  impl->set_data_ptr_noswap(c10::DataPtr(nullptr, impl->device()));
  impl->release_data_and_set_meta_custom_data_ptr_error_msg_(std::string(message));
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"turn", turn, METH_NOARGS, nullptr},
    {"let_go", let_go, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "aoquant_watch", nullptr, -1, functions};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit_aoquant_watch() {
  if (!aoquant::ready_watch() || !aoquant::ready_lookup()) return nullptr;
  PyObject* m = PyModule_Create(&module);
  if (m == nullptr) return nullptr;
  PyModule_AddObjectRef(m, "Watch", reinterpret_cast<PyObject*>(&aoquant::watch_type));
  PyModule_AddObjectRef(m, "Lookup", reinterpret_cast<PyObject*>(&aoquant::lookup_type));
  return m;
}
