"""AlphaFold 2: embedders, Evoformer, structure module and heads, with recycling (Suppl. Alg. 2)."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from foldcore.config import ModelConfig
from foldcore.features import FEATURES
from jaxfold.embedders import (
    ExtraMSAEmbedder,
    InputEmbedder,
    RecyclingEmbedder,
    TemplateAngleEmbedder,
)
from jaxfold.evoformer import EvoformerBlock, EvoformerStack, ExtraMSAStack
from jaxfold.heads import (
    DistogramHead,
    ExperimentallyResolvedHead,
    MaskedMSAHead,
    PredictedAlignedErrorHead,
    PredictedLDDTHead,
)
from jaxfold.ops import at_least_float32
from jaxfold.primitives import DropoutKey
from jaxfold.structure_module import StructureModule
from jaxfold.template import TemplateEmbedding, TemplatePairBlock, TemplatePairStack

Batch = Mapping[str, Array]

RESAMPLED = tuple(name for name, feature in FEATURES.items() if feature.dims[:1] == ("recycle",))


class Recycled(NamedTuple):
    """What one pass hands to the next (Suppl. 1.10)."""

    prev_msa_first_row: Float[Array, "b r c_m"]
    prev_pair: Float[Array, "b i j c_z"]
    prev_pos: Float[Array, "b r 37 3"]  # angstrom


class AlphaFold(nnx.Module):
    """The complete monomer network (Suppl. Alg. 2)."""

    def __init__(self, config: ModelConfig):
        c = config
        self.c_m, self.c_z = c.c_m, c.c_z
        self.templates_enabled, self.pae_enabled = c.templates_enabled, c.pae_enabled
        self.input_embedder = InputEmbedder(c.c_m, c.c_z, c.max_relative_position)
        self.recycling_embedder = RecyclingEmbedder(c.c_m, c.c_z)
        if c.templates_enabled:
            self.template_embedding = _template_embedding(c)
            self.template_angle_embedder = TemplateAngleEmbedder(c.c_m)
        self.extra_msa_embedder = ExtraMSAEmbedder(c.c_e)
        self.extra_msa_stack = ExtraMSAStack(
            _evoformer_block(c, extra=True),
            c.extra_msa_blocks,
            recompute=c.recompute,
            unroll=c.unroll,
        )
        self.evoformer = EvoformerStack(
            _evoformer_block(c, extra=False),
            c.evoformer_blocks,
            c.c_m,
            c.c_s,
            recompute=c.recompute,
            unroll=c.unroll,
        )
        self.structure_module = _structure_module(c)
        self.distogram_head = DistogramHead(c.c_z)
        self.masked_msa_head = MaskedMSAHead(c.c_m)
        self.experimentally_resolved_head = ExperimentallyResolvedHead(c.c_s)
        self.predicted_lddt_head = PredictedLDDTHead(c.c_s, c.plddt_channels)
        if c.pae_enabled:
            self.predicted_aligned_error_head = PredictedAlignedErrorHead(c.c_z)

    def __call__(self, batch: Batch, dropout: DropoutKey | None = None) -> dict[str, Array]:
        """Predict after ``batch["num_iter_recycling"][0]`` extra passes, which get no gradient.

        The count is data: one compiled program serves all counts. Pass k reads slot k of the MSA
        features.
        """
        num_passes = batch["num_iter_recycling"][0]
        recycled = self._recycle(batch, num_passes, dropout)
        outputs = self._pass(_slot(batch, num_passes), recycled, _at_pass(dropout, num_passes))
        return outputs | self._heads(outputs)

    def _recycle(
        self, batch: Batch, num_passes: Int[Array, ""], dropout: DropoutKey | None
    ) -> Recycled:
        """The state after ``num_passes`` passes without gradient (Suppl. Alg. 31)."""
        graphdef, state = nnx.split(self)
        # the loop's length is data, which reverse mode cannot differentiate: nothing in it may
        # depend on a differentiated value
        state, batch = jax.lax.stop_gradient((state, dict(batch)))

        def body(index: Int[Array, ""], recycled: Recycled) -> Recycled:
            model = nnx.merge(graphdef, state)
            model.set_attributes(unroll=False)  # a loop saves nothing that it would have to copy
            outputs = model._pass(_slot(batch, index), recycled, _at_pass(dropout, index))
            return Recycled(
                outputs["msa_first_row"], outputs["pair"], outputs["final_atom37_positions"]
            )

        return jax.lax.fori_loop(0, num_passes, body, self._first_state(batch))

    def _first_state(self, batch: Batch) -> Recycled:
        shape, trunk = batch["aatype"].shape, self.input_embedder.preprocess_msa.weights.dtype
        return Recycled(
            jnp.zeros((*shape, self.c_m), trunk),
            jnp.zeros((*shape, shape[-1], self.c_z), trunk),
            jnp.zeros((*shape, 37, 3), at_least_float32(trunk)),
        )

    def _pass(
        self, batch: Batch, recycled: Recycled, dropout: DropoutKey | None
    ) -> dict[str, Array]:
        """Representations and structure of one pass; ``batch`` has no recycling axis."""
        representations = self._trunk(batch, recycled, dropout)
        structure = self.structure_module(
            representations["single"],
            representations["pair"],
            batch,
            dropout.enter("structure_module") if dropout else None,
        )
        return representations | structure

    def _trunk(
        self, batch: Batch, recycled: Recycled, dropout: DropoutKey | None
    ) -> dict[str, Array]:
        """Everything up to the single representation (Suppl. Alg. 2, lines 5-18)."""
        dropout = dropout.enter("evoformer") if dropout else None
        pair_mask = batch["seq_mask"][:, :, None] * batch["seq_mask"][:, None, :]
        msa, pair = self.input_embedder(
            batch["target_feat"], batch["residue_index"], batch["msa_feat"]
        )
        first_row, pair_update = self.recycling_embedder(batch["aatype"], *recycled)
        msa, pair = msa.at[:, 0].add(first_row), pair + pair_update
        if self.templates_enabled:
            pair = pair + self._templates(batch, pair, pair_mask, dropout)
        pair = self._extra_msa(batch, pair, pair_mask, dropout)
        rows, row_mask = self._with_template_rows(batch, msa)
        rows, pair, single = self.evoformer(rows, pair, row_mask, pair_mask, dropout)
        return {
            "msa": rows[:, : msa.shape[1]],
            "msa_first_row": rows[:, 0],
            "pair": pair,
            "single": single,
        }

    def _templates(
        self, batch: Batch, pair: Array, pair_mask: Array, dropout: DropoutKey | None
    ) -> Float[Array, "b i j c_z"]:
        return self.template_embedding(
            pair,
            pair_mask,
            batch["template_aatype"],
            batch["template_pseudo_beta"],
            batch["template_pseudo_beta_mask"],
            batch["template_all_atom_masks"],
            batch["template_mask"],
            dropout,
        )

    def _extra_msa(
        self, batch: Batch, pair: Array, pair_mask: Array, dropout: DropoutKey | None
    ) -> Float[Array, "b i j c_z"]:
        extra = self.extra_msa_embedder(
            batch["extra_msa"], batch["extra_has_deletion"], batch["extra_deletion_value"]
        )
        return self.extra_msa_stack(extra, pair, batch["extra_msa_mask"], pair_mask, dropout)

    def _with_template_rows(
        self, batch: Batch, msa: Float[Array, "b s r c_m"]
    ) -> tuple[Float[Array, "b s_t r c_m"], Float[Array, "b s_t r"]]:
        """The MSA and its mask, with a row for each template's torsions at the end."""
        if not self.templates_enabled:
            return msa, batch["msa_mask"]
        rows, mask = self.template_angle_embedder(
            batch["template_aatype"],
            batch["template_all_atom_positions"],
            batch["template_all_atom_masks"],
        )
        msa_mask = jnp.concatenate(
            [batch["msa_mask"], mask.astype(batch["msa_mask"].dtype)], axis=1
        )
        return jnp.concatenate([msa, rows], axis=1), msa_mask

    def _heads(self, outputs: Mapping[str, Array]) -> dict[str, Array]:
        logits = {
            "distogram_logits": self.distogram_head(outputs["pair"]),
            "masked_msa_logits": self.masked_msa_head(outputs["msa"]),
            "experimentally_resolved_logits": self.experimentally_resolved_head(outputs["single"]),
            "plddt_logits": self.predicted_lddt_head(outputs["structure_module_single"]),
        }
        if self.pae_enabled:
            logits["aligned_error_logits"] = self.predicted_aligned_error_head(outputs["pair"])
        return logits


def _slot(batch: Batch, index: Int[Array, ""]) -> dict[str, Array]:
    """The batch of one pass: its own MSA sample, everything else as it is."""
    return {
        name: jax.lax.dynamic_index_in_dim(array, index, axis=1, keepdims=False)
        if name in RESAMPLED
        else array
        for name, array in batch.items()
    }


def _at_pass(dropout: DropoutKey | None, index: Int[Array, ""]) -> DropoutKey | None:
    return dropout.at_pass(index) if dropout else None


# From the configuration to the parts --------------------------------------------------------------


def _evoformer_block(c: ModelConfig, extra: bool) -> EvoformerBlock:
    return EvoformerBlock(
        c.c_e if extra else c.c_m,
        c.c_z,
        msa_heads=c.extra_msa_heads if extra else c.msa_heads,
        msa_head_dim=c.extra_msa_head_dim if extra else c.msa_head_dim,
        pair_heads=c.pair_heads,
        pair_head_dim=c.pair_head_dim,
        outer_product_hidden=c.outer_product_hidden,
        triangle_hidden=c.triangle_hidden,
        transition_factor=c.transition_factor,
        msa_dropout=c.msa_dropout,
        pair_dropout=c.pair_dropout,
        global_column_attention=extra,
    )


def _template_embedding(c: ModelConfig) -> TemplateEmbedding:
    block = TemplatePairBlock(
        c.c_t,
        num_heads=c.template_pair_heads,
        c_hidden=c.template_pair_head_dim,
        triangle_hidden=c.template_triangle_hidden,
        transition_factor=c.template_transition_factor,
        dropout_rate=c.pair_dropout,
    )
    stack = TemplatePairStack(block, c.template_blocks, recompute=c.recompute, unroll=c.unroll)
    return TemplateEmbedding(
        c.c_z, c.c_t, c.template_pointwise_heads, c.template_pointwise_head_dim, stack
    )


def _structure_module(c: ModelConfig) -> StructureModule:
    return StructureModule(
        c.c_s,
        c.c_z,
        num_iterations=c.structure_iterations,
        num_heads=c.ipa_heads,
        c_hidden=c.ipa_scalar_dim,
        num_query_points=c.ipa_query_points,
        num_value_points=c.ipa_value_points,
        sidechain_channels=c.sidechain_channels,
        dropout_rate=c.structure_dropout,
    )
