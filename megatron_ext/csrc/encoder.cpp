// Python binding of the exact SentencePiece-BPE encoder: documents in, arrays of ids out, without the GIL.
//
// The semantics are those of sentencepiece 0.2.3; encoder_tables.h explains why cutting and table look-ups give the
// same ids as its merge loop.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "encoder_worker.h"

namespace py = pybind11;

namespace encoder {

// The texts of a call: views into Python objects, which are kept alive.
struct Texts {
  explicit Texts(const py::sequence& items) {
    const size_t count = py::len(items);
    for (size_t i = 0; i < count; ++i) add(py::reinterpret_borrow<py::object>(items[i]), i);
  }
  // Bytes that are not UTF-8 are replaced before encoding; needs no GIL.
  std::string_view valid(size_t i, std::string& space) const {
    if (!is_bytes[i] || is_valid(views[i])) return views[i];
    return space = repair(views[i]);
  }

  std::vector<std::string_view> views;
  std::vector<bool> is_bytes;

 private:
  void add(py::object item, size_t index) {
    if (PyUnicode_Check(item.ptr())) {
      Py_ssize_t size;
      const char* data = PyUnicode_AsUTF8AndSize(item.ptr(), &size);
      if (data == nullptr) throw py::error_already_set();
      views.emplace_back(data, static_cast<size_t>(size));
    } else if (PyBytes_Check(item.ptr())) {
      views.emplace_back(PyBytes_AS_STRING(item.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(item.ptr())));
    } else {
      throw py::type_error("text " + std::to_string(index) + " is neither str nor bytes");
    }
    if (views.back().size() >= size_t{1} << 31) {
      throw py::value_error("text " + std::to_string(index) + " has 2 GiB or more: split it");
    }
    is_bytes.push_back(!PyUnicode_Check(item.ptr()));
    keep_.push_back(std::move(item));
  }
  std::vector<py::object> keep_;
};

// How ids of an array of T are stored until it is made: those of 32 bits as the worker writes them.
template <typename T>
using Stored = std::conditional_t<sizeof(T) == 4, uint32_t, T>;

template <typename T, typename From>
py::array_t<T> to_array(Buffer<From>&& buffer) {
  static_assert(sizeof(T) == sizeof(From));
  const size_t size = buffer.size();
  buffer.reserve(1);  // a capsule cannot own a null pointer
  T* data = reinterpret_cast<T*>(buffer.release());
  py::capsule owner(data, [](void* memory) { std::free(memory); });
  return py::array_t<T>({size}, {sizeof(T)}, data, owner);
}

class Encoder {
 public:
  explicit Encoder(const py::bytes& model) : tables_(read_model(std::string_view(model))) {}

  const Tables& tables() const { return tables_; }

  // Concatenated ids of all texts, and the number of ids of each. `eod` >= 0 is appended to every text with ids.
  template <typename T>
  std::pair<py::array_t<T>, py::array_t<int32_t>> encode(const Texts& texts, size_t threads, int64_t eod) {
    const size_t count = texts.views.size();
    Buffer<int32_t> sizes;
    sizes.resize(count);
    Buffer<Stored<T>> flat;
    {
      py::gil_scoped_release release;
      std::vector<Buffer<Stored<T>>> parts((count + kBlock - 1) / kBlock);
      for_each_block(count, threads, [&](Worker& worker, size_t block, size_t begin, size_t end) {
        Buffer<Stored<T>>& part = threads > 1 ? parts[block] : flat;
        std::string space;
        Buffer<uint32_t> ids;
        for (size_t i = begin; i < end; ++i) {
          const size_t before = part.size();
          append(worker, texts.valid(i, space), eod, ids, part);
          sizes.data()[i] = static_cast<int32_t>(part.size() - before);
        }
      });
      if (threads > 1) concatenate(parts, flat);
    }
    return {to_array<T>(std::move(flat)), to_array<int32_t>(std::move(sizes))};
  }

  // The number of ids of each text.
  py::array_t<int64_t> count(const Texts& texts, size_t threads) {
    Buffer<int64_t> sizes;
    sizes.resize(texts.views.size());
    {
      py::gil_scoped_release release;
      for_each_block(texts.views.size(), threads, [&](Worker& worker, size_t, size_t begin, size_t end) {
        std::string space;
        Buffer<uint32_t> ids;
        for (size_t i = begin; i < end; ++i) {
          ids.clear();
          worker.encode(texts.valid(i, space), ids);
          sizes.data()[i] = static_cast<int64_t>(ids.size());
        }
      });
    }
    return to_array<int64_t>(std::move(sizes));
  }

  // Adds the number of occurrences of each id in all texts to histogram[id].
  void histogram(const Texts& texts, py::array_t<int64_t, py::array::c_style> histogram) {
    if (static_cast<size_t>(histogram.size()) != tables_.num_pieces) {
      throw py::value_error("the histogram needs one place a piece");
    }
    int64_t* counts = histogram.mutable_data();
    py::gil_scoped_release release;
    for_each_block(texts.views.size(), 1, [&](Worker& worker, size_t, size_t begin, size_t end) {
      std::string space;
      Buffer<uint32_t> ids;
      for (size_t i = begin; i < end; ++i) {
        ids.clear();
        worker.encode(texts.valid(i, space), ids);
        for (size_t k = 0; k < ids.size(); ++k) ++counts[ids.data()[k]];
      }
    });
  }

  py::array_t<int32_t> derivations() const {
    py::array_t<int32_t> result({tables_.num_pieces, size_t{2}});
    for (size_t i = 0; i < tables_.num_pieces; ++i) {
      result.mutable_at(i, 0) = tables_.derivation[i][0];
      result.mutable_at(i, 1) = tables_.derivation[i][1];
    }
    return result;
  }

  // Empties the caches (for benchmarks).
  void clear_cache() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const std::unique_ptr<Worker>& worker : idle_) worker->forget();
  }

 private:
  static constexpr size_t kBlock = 16;  // texts that a thread processes at a time

  // Appends the ids of one text, and `eod` >= 0 if there are any; `space` is work space.
  template <typename Id>
  static void append(Worker& worker, std::string_view text, int64_t eod, Buffer<uint32_t>& space, Buffer<Id>& to) {
    if constexpr (std::is_same_v<Id, uint32_t>) {
      const size_t before = to.size();
      worker.encode(text, to);
      if (eod < 0 || to.size() == before) return;
      to.reserve(to.size() + 1);
      to.push(static_cast<uint32_t>(eod));
    } else {
      space.clear();
      append(worker, text, eod, space, space);
      const size_t before = to.size();
      to.resize(before + space.size());
      std::copy_n(space.data(), space.size(), to.data() + before);
    }
  }

  template <typename T>
  static void concatenate(const std::vector<Buffer<T>>& parts, Buffer<T>& flat) {
    size_t total = 0;
    for (const Buffer<T>& part : parts) total += part.size();
    flat.resize(total);
    size_t at = 0;
    for (const Buffer<T>& part : parts) {
      std::copy_n(part.data(), part.size(), flat.data() + at);
      at += part.size();
    }
  }

  std::unique_ptr<Worker> borrow() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!idle_.empty()) {
        std::unique_ptr<Worker> worker = std::move(idle_.back());
        idle_.pop_back();
        return worker;
      }
    }
    return std::make_unique<Worker>(tables_);
  }

  void give_back(std::unique_ptr<Worker> worker) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(worker));
  }

  // work(worker, block, begin, end) for every block of texts; the first error of a thread is rethrown here.
  template <typename Work>
  void for_each_block(size_t count, size_t threads, const Work& work) {
    std::atomic<size_t> next{0};
    std::exception_ptr error;
    const auto run = [&] {
      try {
        std::unique_ptr<Worker> worker = borrow();
        for (size_t block = next++; block * kBlock < count; block = next++) {
          work(*worker, block, block * kBlock, std::min(count, (block + 1) * kBlock));
        }
        give_back(std::move(worker));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error) error = std::current_exception();
        next = count;  // block * kBlock >= count from now on: the other threads stop
      }
    };
    std::vector<std::thread> others;
    const size_t useful = std::min(threads, (count + kBlock - 1) / kBlock);
    for (size_t i = 1; i < useful; ++i) others.emplace_back(run);
    run();
    for (std::thread& other : others) other.join();
    if (error) std::rethrow_exception(error);
  }

  Tables tables_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> idle_;
};

}  // namespace encoder

PYBIND11_MODULE(_encoder, m) {
  using encoder::Encoder;
  using encoder::Texts;
  m.doc() = "Exact SentencePiece-BPE encoder; use megatron_ext.tokenizer.NativeEncoder.";
  py::register_exception<encoder::Unsupported>(m, "UnsupportedModel");
  py::class_<Encoder>(m, "Encoder")
      .def(py::init<const py::bytes&>(), py::arg("model"))
      .def_property_readonly("needs_normalizer", [](const Encoder& e) { return e.tables().needs_normalizer; })
      .def("encode_int32",
           [](Encoder& e, const py::sequence& texts, size_t threads, int64_t eod) {
             return e.encode<int32_t>(Texts(texts), threads, eod);
           },
           py::arg("texts"), py::arg("threads") = 1, py::arg("eod") = -1)
      .def("encode_uint16",
           [](Encoder& e, const py::sequence& texts, size_t threads, int64_t eod) {
             return e.encode<uint16_t>(Texts(texts), threads, eod);
           },
           py::arg("texts"), py::arg("threads") = 1, py::arg("eod") = -1)
      .def("count", [](Encoder& e, const py::sequence& texts, size_t threads) { return e.count(Texts(texts), threads); },
           py::arg("texts"), py::arg("threads") = 1)
      .def("histogram",
           [](Encoder& e, const py::sequence& texts, py::array_t<int64_t, py::array::c_style> counts) {
             e.histogram(Texts(texts), std::move(counts));
           },
           py::arg("texts"), py::arg("counts").noconvert())
      .def("derivations", &Encoder::derivations)
      .def("clear_cache", &Encoder::clear_cache);
}
