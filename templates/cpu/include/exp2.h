// 2^x for x <= 0 by integer arithmetic on the exponent, for instruction sets without their own.
#pragma once

#include "cpu/include/vector.h"

// Below -126 the result is a number that small, not zero.
template <int kDegree>
static inline Vec exp2_negative(Vec x) {
  const Vec to_integer = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded x in the low bits
  x = maximum(broadcast(-126.0f), x);
  const Vec shifted = x + to_integer;
  const Vec p = exp2_fraction<kDegree>(x - (shifted - to_integer));
  return (Vec)((WordVec)p + ((WordVec)shifted << 23));
}
