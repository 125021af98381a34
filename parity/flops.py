"""What a training step computes, counted from the sizes: the matrix products of the model.

Two operations for each multiplication and addition. A pass without gradient counts once, the last
one three times: each product has two in the backward pass. Recomputation is the program's choice
and does not count, nor does what is no product.

Legend: n positions, c channels, h heads, d their width, s sequences, r residues, t templates.
"""

from foldcore.config import Config, DataConfig, ModelConfig

# dense products in bfloat16 a second, as the makers state them, by a part of the device's name
PEAKS = {"B200": 2.25e15, "H200": 9.89e14, "H100": 9.89e14, "A100": 3.12e14}

TARGET, MSA, EXTRA, BINS = 22, 49, 25, 15  # channels of the features
TEMPLATE_PAIR, TEMPLATE_ANGLES = 88, 57
LETTERS, DISTANCES, ATOMS, CONFIDENCES = 23, 64, 37, 50  # classes that the heads predict
TORSIONS = 14


def linear(n: float, c_in: float, c_out: float) -> float:
    """A product with a matrix of weights."""
    return 2 * n * c_in * c_out


def attention(
    n: int, length: int, c: int, h: int, d: int, pairs: int = 0, c_bias: int = 0
) -> float:
    """Four projections, scores and means over ``length`` positions, output; the pairs' bias."""
    inside = 2 * 2 * n * length * h * d
    return linear(n, c, 4 * h * d) + inside + linear(n, h * d, c) + linear(pairs, c_bias, h)


def global_attention(n: int, c: int, h: int, d: int) -> float:
    """Gate and output, one key and value for all heads, one query a group."""
    return 2 * linear(n, c, h * d) + linear(n, c, 2 * d) + 2 * 2 * n * h * d


def transition(n: int, c: int, factor: int) -> float:
    """Two layers."""
    return 2 * linear(n, c, factor * c)


def outer_product_mean(s: int, r: int, c_m: int, c_z: int, c: int) -> float:
    """Both projections, the outer products summed over sequences, their projection."""
    return 2 * linear(s * r, c_m, c) + linear(s, r * c, r * c) + linear(r * r, c * c, c_z)


def triangle_multiplication(r: int, c_z: int, c: int) -> float:
    """Four projections, the product over third corners, output and its gate."""
    ends = linear(r * r, c, c_z) + linear(r * r, c_z, c_z)
    return linear(r * r, c_z, 4 * c) + 2 * r**3 * c + ends


def pair_update(r: int, c: int, triangle: int, h: int, d: int, factor: int) -> dict[str, float]:
    """What a block does to the pair representation."""
    return {
        "triangle multiplication": 2 * triangle_multiplication(r, c, triangle),
        "triangle attention": 2 * attention(r * r, r, c, h, d, r * r, c),
        "pair transition": transition(r * r, c, factor),
    }


def evoformer_block(m: ModelConfig, s: int, r: int) -> dict[str, float]:
    """One block of the main stack."""
    n, h, d = s * r, m.msa_heads, m.msa_head_dim
    return {
        "MSA row attention": attention(n, r, m.c_m, h, d, r * r, m.c_z),
        "MSA column attention": attention(n, s, m.c_m, h, d),
        "MSA transition": transition(n, m.c_m, m.transition_factor),
        "outer product mean": outer_product_mean(s, r, m.c_m, m.c_z, m.outer_product_hidden),
        **_pairs(m, r),
    }


def extra_block(m: ModelConfig, s: int, r: int) -> dict[str, float]:
    """One block of the extra MSA stack."""
    n, h, d = s * r, m.extra_msa_heads, m.extra_msa_head_dim
    return {
        "MSA row attention": attention(n, r, m.c_e, h, d, r * r, m.c_z),
        "MSA column attention": global_attention(n, m.c_e, h, d),
        "MSA transition": transition(n, m.c_e, m.transition_factor),
        "outer product mean": outer_product_mean(s, r, m.c_e, m.c_z, m.outer_product_hidden),
        **_pairs(m, r),
    }


def _pairs(m: ModelConfig, r: int) -> dict[str, float]:
    sizes = (m.c_z, m.triangle_hidden, m.pair_heads, m.pair_head_dim, m.transition_factor)
    return pair_update(r, *sizes)


def template_stack(m: ModelConfig, t: int, r: int) -> float:
    """The pair stack of all templates."""
    sizes = (m.c_t, m.template_triangle_hidden, m.template_pair_heads, m.template_pair_head_dim)
    block = sum(pair_update(r, *sizes, m.template_transition_factor).values())
    return t * m.template_blocks * block


def template_attention(m: ModelConfig, t: int, r: int) -> float:
    """From features to the stack, and attention to the templates at each pair."""
    width = m.template_pointwise_heads * m.template_pointwise_head_dim
    keys = linear(t * r * r, m.c_t, 2 * width) + 2 * 2 * t * r * r * width
    return t * linear(r * r, TEMPLATE_PAIR, m.c_t) + keys + 2 * linear(r * r, m.c_z, width)


def template_rows(m: ModelConfig, t: int, r: int) -> float:
    """Rows of the MSA from the templates' torsions."""
    return linear(t * r, TEMPLATE_ANGLES + m.c_m, m.c_m)


def templates(m: ModelConfig, t: int, r: int) -> float:
    """Everything that templates take."""
    return template_stack(m, t, r) + template_attention(m, t, r) + template_rows(m, t, r)


def embedders(m: ModelConfig, data: DataConfig) -> float:
    """Features and what the pass before left, to representations."""
    r, relpos = data.crop_size, 2 * m.max_relative_position + 1
    msa = linear(data.num_msa_clusters * r, MSA, m.c_m) + linear(r, TARGET, m.c_m + 2 * m.c_z)
    extra = linear(data.num_extra_msa * r, EXTRA, m.c_e)
    return msa + extra + linear(r * r, relpos + BINS, m.c_z)


def structure_module(m: ModelConfig, r: int) -> float:
    """Iterations with their attention, and torsions."""
    h, c, points = m.ipa_heads, m.ipa_scalar_dim, 3 * m.ipa_query_points
    values = 3 * m.ipa_value_points
    projections = linear(r, m.c_s, h * (3 * c + 2 * points + values))
    inside = 2 * r * r * h * (c + points) + 2 * r * r * h * (c + values + m.c_z)
    read = h * (c + 4 * m.ipa_value_points + m.c_z)
    iteration = projections + inside + linear(r, read + 3 * m.c_s + 6, m.c_s)
    hidden = m.sidechain_channels
    torsions = 2 * linear(r, m.c_s, hidden) + linear(r, 4 * hidden + TORSIONS, hidden)
    once = linear(r, m.c_s, m.c_s) + linear(r * r, m.c_z, h) + linear(r, m.c_m, m.c_s)
    return once + m.structure_iterations * (iteration + torsions)


def heads(m: ModelConfig, data: DataConfig) -> float:
    """After the last pass."""
    r, hidden = data.crop_size, m.plddt_channels
    pairs = DISTANCES * (2 if m.pae_enabled else 1)
    confidence = linear(r, m.c_s + hidden + CONFIDENCES, hidden)
    letters = linear(data.num_msa_clusters * r, m.c_m, LETTERS)
    return linear(r * r, m.c_z, pairs) + letters + linear(r, m.c_s, ATOMS) + confidence


def forward(config: Config) -> dict[str, float]:
    """Operations of a pass over one example, by module; heads are not among them."""
    m, data = config.model, config.data
    r, t = data.crop_size, data.num_templates if config.model.templates_enabled else 0
    block = evoformer_block(m, data.num_msa_clusters + t, r)
    return {
        **{name: m.evoformer_blocks * count for name, count in block.items()},
        "extra MSA stack": m.extra_msa_blocks * sum(extra_block(m, data.num_extra_msa, r).values()),
        "templates": templates(m, t, r) if t else 0.0,
        "embedders": embedders(m, data),
        "structure module": structure_module(m, r),
    }


def step(config: Config, recycling: float) -> float:
    """Operations of a training step with so many passes without gradient."""
    once = sum(forward(config).values())
    return config.train.batch_size * ((recycling + 3) * once + 3 * heads(config.model, config.data))


def utilization(operations: float, seconds: float, device: str) -> float | None:
    """Share of the device's matrix rate; None where that is not known."""
    rate = next((rate for name, rate in PEAKS.items() if name in device), None)
    return operations / seconds / rate if rate else None
