// Rows of a quantized token embedding.
#pragma once

#include <vector>

#include "call.h"
#include "mlx/array.h"
#include "mlx/utils.h"
#include "primitives/primitive.h"

namespace mlx_marlin {

namespace mx = mlx::core;

// ids: uint32 [...]; codes: uint16 [rows, groups * (1 + 16 * bits)]; signs: float16 [groups, 256] -> [..., features].
mx::array trellis_embedding(
    const mx::array& ids, const mx::array& codes, const mx::array& signs, const EmbeddingCall& call, mx::Dtype dtype,
    mx::StreamOrDevice s);

// Inputs: ids, codes, signs.
class TrellisEmbedding : public TrellisPrimitive<EmbeddingCall> {
  MARLIN_PRIMITIVE(TrellisEmbedding)
};

}  // namespace mlx_marlin
