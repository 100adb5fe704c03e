// vmad_edge.kernels._cpu: kernels/include/similarity.h on NumPy arrays. kernels/__init__.py checks every argument.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "similarity.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T, int ndim>
using Array = nb::ndarray<T, nb::ndim<ndim>, nb::c_contig, nb::device::cpu>;
using Index = std::int64_t;

vmad::Rows rows_of(const Array<const float, 2>& array, bool normalised) {
  return {array.data(), Index(array.shape(0)), Index(array.shape(1)), normalised};
}

}  // namespace

NB_MODULE(_cpu, m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();

  m.def(
      "normalise",
      [](Array<const float, 2> rows, Array<float, 2> unit) { vmad::normalise(rows_of(rows, false), unit.data()); },
      "rows"_a.noconvert(), "unit"_a.noconvert(), release);

  m.def(
      "max_cosine",
      [](Array<const float, 2> query, Array<const float, 2> bank, bool bank_normalised, Index k, Index threads,
         Array<float, 1> score, Array<Index, 1> index) {
        vmad::max_cosine(rows_of(query, false), rows_of(bank, bank_normalised), k, threads, score.data(),
                         index.data());
      },
      "query"_a.noconvert(), "bank"_a.noconvert(), "bank_normalised"_a, "k"_a, "threads"_a, "score"_a.noconvert(),
      "index"_a.noconvert(), release);

  m.def(
      "segmented_max_cosine",
      [](Array<const float, 2> query, Array<const float, 2> bank, bool bank_normalised,
         Array<const Index, 1> offsets, Index threads, Array<float, 2> score) {
        vmad::segmented_max_cosine(rows_of(query, false), rows_of(bank, bank_normalised), offsets.data(),
                                   Index(offsets.shape(0)) - 1, threads, score.data());
      },
      "query"_a.noconvert(), "bank"_a.noconvert(), "bank_normalised"_a, "offsets"_a.noconvert(), "threads"_a,
      "score"_a.noconvert(), release);
}
