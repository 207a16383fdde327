// Lookup(weights, kept, function, slow)(*args): function(*packs, *(args[i] for i in kept)), with the packs that were remembered
// for the weights args[i], i in weights, if all of them are as they were; slow(this, *args) otherwise, which is expected to
// call remember(refs, packs, watch): weak references to those weights, a tuple of tensors, and a Watch of them, or None
// where nobody asks whether they changed. forget(id of the first weight) lets go of the packs. Every argument is in weights or
// in kept; what a linear shares with an embedding is in both, what two linears share twice in weights.
#pragma once

#include <algorithm>
#include <unordered_map>

#include "watch.h"

namespace aoquant {

int64_t generation = 0;  // of what any Lookup remembers

struct Packs {  // of one set of weights; everything is owned
  PyObject *refs, *packs, *watch;
  int64_t generation;
};

struct Lookup {
  PyObject_HEAD
  PyObject *function, *slow, *weakrefs;
  Py_ssize_t count;  // of arguments
  std::vector<Py_ssize_t>*weights, *kept;
  std::unordered_map<PyObject*, Packs>* known;  // by the first weight, not owned
  vectorcallfunc call;
};

void release(Packs& packs) {
  Py_DECREF(packs.refs);
  Py_DECREF(packs.packs);
  Py_DECREF(packs.watch);
}

bool same(const Packs& packs, const std::vector<Py_ssize_t>& places, PyObject* const* args) {
  for (size_t i = 0; i < places.size(); ++i) {
    PyObject* object = referent(PyTuple_GET_ITEM(packs.refs, (Py_ssize_t)i));
    Py_XDECREF(object);  // the arguments hold it
    if (object != args[places[i]]) return false;
  }
  return packs.watch == Py_None || (packs.generation == generation && !stale(reinterpret_cast<Watch*>(packs.watch)));
}

PyObject* lookup_call(PyObject* self, PyObject* const* args, size_t flags, PyObject* names) {
  auto* lookup = reinterpret_cast<Lookup*>(self);
  const Py_ssize_t count = PyVectorcall_NARGS(flags);
  if (names != nullptr || count != lookup->count) {
    PyErr_SetString(PyExc_TypeError, "Lookup: called with other arguments than the graph has");
    return nullptr;
  }
  auto found = lookup->known->find(args[lookup->weights->front()]);
  std::vector<PyObject*> out;
  if (found == lookup->known->end() || !same(found->second, *lookup->weights, args)) {
    out.push_back(self);
    out.insert(out.end(), args, args + count);
    return PyObject_Vectorcall(lookup->slow, out.data(), out.size(), nullptr);
  }
  PyObject* packs = Py_NewRef(found->second.packs);  // the call may forget them
  const Py_ssize_t length = PyTuple_GET_SIZE(packs);
  out.reserve(length + lookup->kept->size());
  for (Py_ssize_t i = 0; i < length; ++i) out.push_back(PyTuple_GET_ITEM(packs, i));
  for (Py_ssize_t place : *lookup->kept) out.push_back(args[place]);
  PyObject* result = PyObject_Vectorcall(lookup->function, out.data(), out.size(), nullptr);
  Py_DECREF(packs);
  return result;
}

PyObject* lookup_remember(PyObject* self, PyObject* args) {
  auto* lookup = reinterpret_cast<Lookup*>(self);
  PyObject *refs, *packs, *watch;
  if (!PyArg_ParseTuple(args, "O!O!O", &PyTuple_Type, &refs, &PyTuple_Type, &packs, &watch)) return nullptr;
  if (PyTuple_GET_SIZE(refs) != (Py_ssize_t)lookup->weights->size() || (watch != Py_None && !Py_IS_TYPE(watch, &watch_type))) {
    PyErr_SetString(PyExc_TypeError, "Lookup.remember: a reference for each weight, and a Watch or None are wanted");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(refs); ++i) {
    if (!PyWeakref_Check(PyTuple_GET_ITEM(refs, i))) {
      PyErr_SetString(PyExc_TypeError, "Lookup.remember: refs are weak references");
      return nullptr;
    }
  }
  PyObject* first = referent(PyTuple_GET_ITEM(refs, 0));
  if (first == nullptr) Py_RETURN_NONE;
  Py_DECREF(first);
  const Packs fresh = {Py_NewRef(refs), Py_NewRef(packs), Py_NewRef(watch), generation};
  auto [place, added] = lookup->known->try_emplace(first, fresh);
  if (!added) {
    Packs old = place->second;
    place->second = fresh;
    release(old);
  }
  Py_RETURN_NONE;
}

PyObject* lookup_forget(PyObject* self, PyObject* key) {
  auto* known = reinterpret_cast<Lookup*>(self)->known;
  auto found = known->find(reinterpret_cast<PyObject*>(PyLong_AsVoidPtr(key)));
  if (PyErr_Occurred()) return nullptr;
  if (found != known->end()) {
    Packs old = found->second;
    known->erase(found);
    release(old);
  }
  Py_RETURN_NONE;
}

bool read(PyObject* tuple, std::vector<Py_ssize_t>& into) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    into.push_back(PyLong_AsSsize_t(PyTuple_GET_ITEM(tuple, i)));
  }
  return !PyErr_Occurred();
}

PyObject* lookup_new(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *weights, *kept, *function, *slow;
  if (!PyArg_ParseTuple(args, "O!O!OO", &PyTuple_Type, &weights, &PyTuple_Type, &kept, &function, &slow)) return nullptr;
  std::vector<Py_ssize_t> looked, passed;
  if (!read(weights, looked) || !read(kept, passed)) return nullptr;
  const Py_ssize_t most = looked.size() + passed.size();
  std::vector<bool> named(most, false);
  bool inside = !looked.empty();
  for (const auto* places : {&looked, &passed}) {
    for (Py_ssize_t place : *places) {
      inside = inside && place >= 0 && place < most;
      if (inside) named[place] = true;
    }
  }
  const Py_ssize_t count = std::count(named.begin(), named.end(), true);
  if (!inside || !std::all_of(named.begin(), named.begin() + count, [](bool is) { return is; })) {
    PyErr_SetString(PyExc_ValueError, "Lookup: weights and kept are the places of all arguments");
    return nullptr;
  }
  auto* lookup = reinterpret_cast<Lookup*>(type->tp_alloc(type, 0));
  if (lookup == nullptr) return nullptr;
  lookup->function = Py_NewRef(function);
  lookup->slow = Py_NewRef(slow);
  lookup->count = count;
  lookup->weights = new std::vector<Py_ssize_t>(std::move(looked));
  lookup->kept = new std::vector<Py_ssize_t>(std::move(passed));
  lookup->known = new std::unordered_map<PyObject*, Packs>();
  lookup->call = lookup_call;
  return reinterpret_cast<PyObject*>(lookup);
}

void lookup_dealloc(PyObject* self) {
  auto* lookup = reinterpret_cast<Lookup*>(self);
  if (lookup->weakrefs != nullptr) PyObject_ClearWeakRefs(self);
  for (auto& [first, packs] : *lookup->known) release(packs);
  delete lookup->known;
  delete lookup->weights;
  delete lookup->kept;
  Py_DECREF(lookup->function);
  Py_DECREF(lookup->slow);
  Py_TYPE(self)->tp_free(self);
}
PyTypeObject lookup_type = {PyVarObject_HEAD_INIT(nullptr, 0)};
PyMethodDef lookup_methods[] = {
    {"remember", lookup_remember, METH_VARARGS, nullptr},
    {"forget", lookup_forget, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

inline bool ready_lookup() {
  lookup_type.tp_name = "aoquant_watch.Lookup";
  lookup_type.tp_basicsize = sizeof(Lookup);
  lookup_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  lookup_type.tp_vectorcall_offset = offsetof(Lookup, call);
  lookup_type.tp_weaklistoffset = offsetof(Lookup, weakrefs);
  lookup_type.tp_call = PyVectorcall_Call;
  lookup_type.tp_new = lookup_new;
  lookup_type.tp_dealloc = lookup_dealloc;
  lookup_type.tp_methods = lookup_methods;
  return PyType_Ready(&lookup_type) == 0;
}

}  // namespace aoquant
