// Operands of the products, vectors of fp32 numbers or of pairs of bf16, and how rows of tensors become them and back.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/include/element.h"

// Elements that a lane of an operand holds.
template <typename Operand>
constexpr int kElementsIn = std::is_same_v<Operand, WordVec> ? 2 : 1;

// kCount elements of a row.
template <typename Operand, int kCount, typename Element>
static inline Operand read_operand(const Element* from) {
  if constexpr (kElementsIn<Operand> == 2) {
    return load<WordVec, 2 * kCount>(from);
  } else {
    return Element::template read<kCount>(from);
  }
}

// Transposes kLanes rows of kDim elements: to[i * stride] holds scalar i of every row, its sign flipped by ``sign``.
template <int kDim, typename Operand, typename Element>
static inline void load_transposed(Operand* to, int stride, Element* const (&from)[kLanes], uint32_t sign = 0) {
  for_each_chunk<kDim, kLanes * kElementsIn<Operand>>([&](int column, auto count) {
    Operand block[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) block[lane] = read_operand<Operand, count>(from[lane] + column);
    transpose(block);
    constexpr int kScalars = (count + kElementsIn<Operand> - 1) / kElementsIn<Operand>;
    for (int i = 0; i < kScalars; ++i) {
      to[(column / kElementsIn<Operand> + i) * stride] = (Operand)((WordVec)block[i] ^ sign);
    }
  });
}

// Writes kLanes rows of kDim elements: value(i) gives element i of every row.
template <int kDim, typename Element, typename Value>
static inline void store_transposed(Element* const (&to)[kLanes], Value value) {
  for_each_chunk<kDim, kLanes>([&](int column, auto count) {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = value(column + i);
    transpose(block);
    for (int lane = 0; lane < kLanes; ++lane) Element::template write<count>(to[lane] + column, block[lane]);
  });
}

// Copies rows of kDim elements as scalars, kPitch of them from row to row.
template <int kDim, int kPitch, typename Operand, typename Scalar, typename Element>
static inline void load_rows(Scalar* to, const Element* from, int64_t stride, int rows) {
  for (int row = 0; row < rows; ++row) {
    for_each_chunk<kDim, kLanes * kElementsIn<Operand>>([&](int column, auto count) {
      store<sizeof(Operand)>(to + row * kPitch + column / kElementsIn<Operand>,
                             read_operand<Operand, count>(from + row * stride + column));
    });
  }
}

// kCount elements of two rows in turn, as pairs.
template <int kCount, typename Element>
static inline WordVec read_pairs(const Element* even, const Element* odd) {
  return __builtin_convertvector(load<HalfVec, 2 * kCount>(even), WordVec) |
         __builtin_convertvector(load<HalfVec, 2 * kCount>(odd), WordVec) << 16;
}

// As load_rows, but row n of the scalars pairs the rows 2n and 2n + 1; a last one without a partner is paired with zeros.
template <int kDim, int kPitch, typename Element>
static inline void load_row_pairs(uint32_t* to, const Element* from, int64_t stride, int rows) {
  static const Element zeros[kDim] = {};
  for (int row = 0; row < rows; row += 2) {
    const Element* even = from + row * stride;
    const Element* odd = row + 1 < rows ? even + stride : zeros;
    for_each_chunk<kDim, kLanes>([&](int column, auto count) {
      store<sizeof(WordVec)>(to + row / 2 * kPitch + column, read_pairs<count>(even + column, odd + column));
    });
  }
}

// kLanes rows of kDim elements, or as many halves of pairs, as vectors along the columns, in groups of kColumnVectors:
// [group][row or pair of rows][kColumnVectors], group_stride vectors from group to group.
template <int kDim, int kColumnVectors, typename Operand, typename Element>
static inline void load_columns(Operand* to, int group_stride, Element* const (&from)[kLanes]) {
  for_each_chunk<kDim, kLanes>([&](int column, auto count) {
    const int vector = column / kLanes;
    Operand* at = to + vector / kColumnVectors * group_stride + vector % kColumnVectors;
    for (int row = 0; row < kLanes; row += kElementsIn<Operand>) {
      if constexpr (kElementsIn<Operand> == 2) {
        at[row / 2 * kColumnVectors] = read_pairs<count>(from[row] + column, from[row + 1] + column);
      } else {
        at[row * kColumnVectors] = Element::template read<count>(from[row] + column);
      }
    }
  });
}
