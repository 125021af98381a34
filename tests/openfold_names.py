"""OpenFold's state dict at the published sizes, written down a second time, module by module.

Follows the constructors of OpenFold's modules, where ``foldcore/openfold.py`` follows DeepMind's
scopes: names and PyTorch's shapes of its current code (``current``) and of the code that its
published weights are from (``released``).
"""

Shapes = dict[str, tuple[int, ...]]


def linear(c_in: int, c_out: int, bias: bool = True) -> Shapes:
    return {"weight": (c_out, c_in)} | ({"bias": (c_out,)} if bias else {})


def norm(c: int) -> Shapes:
    return {"weight": (c,), "bias": (c,)}


def module(**children: Shapes) -> Shapes:
    """Children's arrays under their attribute names; two underscores stand for a dot."""
    return {
        f"{child.replace('__', '.')}.{name}": shape
        for child, shapes in children.items()
        for name, shape in shapes.items()
    }


def attention(c_q: int, c_kv: int, hidden: int, heads: int, gating: bool = True) -> Shapes:
    wide = hidden * heads
    gate = {"linear_g": linear(c_q, wide)} if gating else {}
    return module(
        linear_q=linear(c_q, wide, bias=False),
        linear_k=linear(c_kv, wide, bias=False),
        linear_v=linear(c_kv, wide, bias=False),
        linear_o=linear(wide, c_q),
        **gate,
    )


def global_attention(c: int, hidden: int, heads: int) -> Shapes:
    return module(
        linear_q=linear(c, hidden * heads, bias=False),
        linear_k=linear(c, hidden, bias=False),
        linear_v=linear(c, hidden, bias=False),
        linear_g=linear(c, hidden * heads),
        linear_o=linear(hidden * heads, c),
    )


def transition(c: int, factor: int) -> Shapes:
    return module(
        layer_norm=norm(c), linear_1=linear(c, factor * c), linear_2=linear(factor * c, c)
    )


def triangle_multiplication(c_z: int, hidden: int) -> Shapes:
    return module(
        linear_a_p=linear(c_z, hidden),
        linear_a_g=linear(c_z, hidden),
        linear_b_p=linear(c_z, hidden),
        linear_b_g=linear(c_z, hidden),
        linear_g=linear(c_z, c_z),
        linear_z=linear(hidden, c_z),
        layer_norm_in=norm(c_z),
        layer_norm_out=norm(hidden),
    )


def triangle_attention(c: int, hidden: int, heads: int) -> Shapes:
    return module(
        layer_norm=norm(c),
        linear=linear(c, heads, bias=False),
        mha=attention(c, c, hidden, heads),
    )


def pair_block(c: int, hidden_attention: int, hidden_multiplication: int, factor: int) -> Shapes:
    return module(
        tri_mul_out=triangle_multiplication(c, hidden_multiplication),
        tri_mul_in=triangle_multiplication(c, hidden_multiplication),
        tri_att_start=triangle_attention(c, hidden_attention, 4),
        tri_att_end=triangle_attention(c, hidden_attention, 4),
        pair_transition=transition(c, factor),
    )


def msa_block(c_m: int, hidden: int, is_extra: bool, released: bool) -> Shapes:
    row = module(
        layer_norm_m=norm(c_m),
        layer_norm_z=norm(128),
        linear_z=linear(128, 8, bias=False),
        mha=attention(c_m, c_m, hidden, 8),
    )
    if is_extra:
        column = module(layer_norm_m=norm(c_m), global_attention=global_attention(c_m, hidden, 8))
    else:
        column = module(_msa_att=module(layer_norm_m=norm(c_m), mha=attention(c_m, c_m, hidden, 8)))
    rest = module(
        msa_transition=transition(c_m, 4),
        outer_product_mean=module(
            layer_norm=norm(c_m),
            linear_1=linear(c_m, 32),
            linear_2=linear(c_m, 32),
            linear_out=linear(32 * 32, 128),
        ),
    )
    pair = pair_block(128, 32, 128, 4)
    attentions = module(msa_att_row=row, msa_att_col=column)
    if released:
        return attentions | module(core=rest | pair)
    return attentions | rest | module(pair_stack=pair)


def blocks(count: int, one: Shapes) -> Shapes:
    return module(**{f"blocks__{i}": one for i in range(count)})


def structure_module(released: bool) -> Shapes:
    points = "" if released else "__linear"
    ipa = module(
        linear_q=linear(384, 16 * 12),
        linear_kv=linear(384, 2 * 16 * 12),
        linear_b=linear(128, 12),
        linear_out=linear(12 * (16 + 8 * 4 + 128), 384),
        **{
            f"linear_q_points{points}": linear(384, 12 * 4 * 3),
            f"linear_kv_points{points}": linear(384, 12 * (4 + 8) * 3),
        },
    )
    wide = {f"linear_{i}": linear(384, 384) for i in (1, 2, 3)}
    residual = module(linear_1=linear(128, 128), linear_2=linear(128, 128))
    return module(
        layer_norm_s=norm(384),
        layer_norm_z=norm(128),
        linear_in=linear(384, 384),
        ipa={"head_weights": (12,)} | ipa,
        layer_norm_ipa=norm(384),
        transition=module(layers__0=module(**wide), layer_norm=norm(384)),
        bb_update=module(linear=linear(384, 6)),
        angle_resnet=module(
            linear_in=linear(384, 128),
            linear_initial=linear(384, 128),
            layers__0=residual,
            layers__1=residual,
            linear_out=linear(128, 14),
        ),
    )


def template_embedder(released: bool) -> Shapes:
    angles = module(linear_1=linear(57, 256), linear_2=linear(256, 256))
    return module(
        **{"template_angle_embedder" if released else "template_single_embedder": angles},
        template_pair_embedder=module(linear=linear(88, 64)),
        template_pair_stack=blocks(2, pair_block(64, 16, 64, 2)) | module(layer_norm=norm(64)),
        template_pointwise_att=module(mha=attention(128, 64, 16, 4, gating=False)),
    )


def heads(ptm: bool) -> Shapes:
    plddt = module(
        layer_norm=norm(384),
        linear_1=linear(384, 128),
        linear_2=linear(128, 128),
        linear_3=linear(128, 50),
    )
    tm = {"tm": module(linear=linear(128, 64))} if ptm else {}
    return module(
        plddt=plddt,
        distogram=module(linear=linear(128, 64)),
        masked_msa=module(linear=linear(256, 23)),
        experimentally_resolved=module(linear=linear(384, 37)),
        **tm,
    )


def state_dict(templates: bool, ptm: bool, released: bool = False) -> Shapes:
    """Names and shapes of the whole network."""
    template = template_embedder(released) if templates else {}
    whole = module(
        input_embedder=module(
            linear_tf_z_i=linear(22, 128),
            linear_tf_z_j=linear(22, 128),
            linear_tf_m=linear(22, 256),
            linear_msa_m=linear(49, 256),
            linear_relpos=linear(65, 128),
        ),
        recycling_embedder=module(
            linear=linear(15, 128), layer_norm_m=norm(256), layer_norm_z=norm(128)
        ),
        extra_msa_embedder=module(linear=linear(25, 64)),
        extra_msa_stack=blocks(4, msa_block(64, 8, True, released)),
        evoformer=blocks(48, msa_block(256, 32, False, released)) | module(linear=linear(256, 384)),
        structure_module=structure_module(released),
        aux_heads=heads(ptm),
    )
    return whole | (template if released else module(template_embedder=template))
