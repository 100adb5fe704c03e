// vmad_edge.kernels._cpu: kernels/include/similarity.h on NumPy arrays. kernels/__init__.py checks every argument.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <utility>

#include "similarity.h"

namespace nb = nanobind;
using namespace nb::literals;
using vmad::Index;

namespace {

template <class T, int ndim>
using Array = nb::ndarray<T, nb::ndim<ndim>, nb::c_contig, nb::device::cpu>;
template <class T, int ndim>
using Maybe = std::optional<Array<T, ndim>>;

/// A vmad::Bank and the arrays that it points into.
struct Bank {
  Bank(int type, Index width, Index first, Index count, Maybe<const std::uint64_t, 1> addresses_,
       Maybe<const float, 2> rows_)
      : addresses(std::move(addresses_)),
        rows(std::move(rows_)),
        bank{vmad::Type(type),
             width,
             first,
             count,
             addresses ? reinterpret_cast<const vmad::Line* const*>(addresses->data()) : nullptr,
             rows ? rows->data() : nullptr} {}

  Maybe<const std::uint64_t, 1> addresses;
  Maybe<const float, 2> rows;
  vmad::Bank bank;
};

const vmad::Path& path_of(Index number) { return *vmad::paths().at(number); }

vmad::Query query_of(const Array<const float, 2>& rows) { return {rows.data(), Index(rows.shape(0))}; }

}  // namespace

NB_MODULE(_cpu, m) {
  const auto release = nb::call_guard<nb::gil_scoped_release>();

  m.attr("BLOCK_ROWS") = vmad::kBlockRows;
  m.attr("MAX_INT8_WIDTH") = vmad::kMaxInt8Width;

  m.def("paths", [] {
    std::vector<std::string> names;
    for (const vmad::Path* path : vmad::paths()) names.emplace_back(vmad::name(*path));
    return names;
  });

  nb::class_<Bank>(m, "Bank").def(
      nb::init<int, Index, Index, Index, Maybe<const std::uint64_t, 1>, Maybe<const float, 2>>(), "type"_a, "width"_a,
      "first"_a, "count"_a, "addresses"_a.none(), "rows"_a.none());

  m.def("panel_lines", [](int type, Index width) { return vmad::panel_lines(vmad::Type(type), width); });

  m.def(
      "pack",
      [](Index path, int type, Array<const float, 2> rows, Array<vmad::Word, 1> block, Index start) {
        vmad::pack(path_of(path), vmad::Type(type), rows.data(), Index(rows.shape(0)), Index(rows.shape(1)),
                   reinterpret_cast<vmad::Line*>(block.data()), start);
      },
      "path"_a, "type"_a, "rows"_a.noconvert(), "block"_a.noconvert(), "start"_a, release);

  m.def(
      "max_cosine",
      [](Index path, Array<const float, 2> query, const Bank& bank, Index k, Index threads, Array<float, 1> score,
         Array<Index, 1> index) {
        vmad::max_cosine(path_of(path), query_of(query), bank.bank, k, threads, score.data(), index.data());
      },
      "path"_a, "query"_a.noconvert(), "bank"_a, "k"_a, "threads"_a, "score"_a.noconvert(), "index"_a.noconvert(),
      release);

  m.def(
      "segmented_max_cosine",
      [](Index path, Array<const float, 2> query, const Bank& bank, Array<const Index, 1> offsets, Index threads,
         Array<float, 2> score) {
        vmad::segmented_max_cosine(path_of(path), query_of(query), bank.bank, offsets.data(),
                                   Index(offsets.shape(0)) - 1, threads, score.data());
      },
      "path"_a, "query"_a.noconvert(), "bank"_a, "offsets"_a.noconvert(), "threads"_a, "score"_a.noconvert(), release);
}
