"""AlphaFold 2: embedders, Evoformer, structure module and heads, with recycling (Suppl. Alg. 2)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foldcore.config import ModelConfig
from foldcore.features import FEATURES
from torchfold.embedders import (
    ExtraMSAEmbedder,
    InputEmbedder,
    RecyclingEmbedder,
    TemplateAngleEmbedder,
)
from torchfold.evoformer import EvoformerBlock, EvoformerStack, ExtraMSAStack
from torchfold.heads import (
    DistogramHead,
    ExperimentallyResolvedHead,
    MaskedMSAHead,
    PredictedAlignedErrorHead,
    PredictedLDDTHead,
)
from torchfold.ops import at_least_float32
from torchfold.primitives import DropoutKey
from torchfold.structure_module import StructureModule
from torchfold.template import TemplateEmbedding, TemplatePairBlock, TemplatePairStack

Batch = Mapping[str, Tensor]

RESAMPLED = tuple(name for name, feature in FEATURES.items() if feature.dims[:1] == ("recycle",))


class Recycled(NamedTuple):
    """What one pass hands to the next (Suppl. 1.10)."""

    prev_msa_first_row: Float[Tensor, "b r c_m"]
    prev_pair: Float[Tensor, "b i j c_z"]
    prev_pos: Float[Tensor, "b r 37 3"]  # angstrom


class AlphaFold(nn.Module):
    """The complete monomer network (Suppl. Alg. 2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
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

    def forward(self, batch: Batch, dropout: DropoutKey | None = None) -> dict[str, Tensor]:
        """Predict after ``batch["num_iter_recycling"][0]`` extra passes, which get no gradient.

        The count must be on the host (a number or a CPU tensor): reading it from the device would
        wait for it. Pass k reads slot k of the MSA features. A batch that holds ``Recycled`` has
        these passes behind it (see ``step.py``): it has one slot, and the count may be anywhere.
        """
        if Recycled._fields[0] in batch:
            outputs = self._one_pass(batch, dropout)
        else:
            count = int(batch["num_iter_recycling"][0])
            recycled = self._recycle(batch, count, dropout)
            outputs = self._pass(_slot(batch, count), recycled, _at_pass(dropout, count))
        return outputs | self._heads(outputs)

    def _one_pass(self, batch: Batch, dropout: DropoutKey | None) -> dict[str, Tensor]:
        """The pass at hand of a batch that holds what the one before left."""
        recycled = Recycled(*(batch[name] for name in Recycled._fields))
        return self._pass(
            _slot(batch, 0), recycled, _at_pass(dropout, batch["num_iter_recycling"][0])
        )

    def _next(self, batch: Batch, dropout: DropoutKey | None) -> Recycled:
        """What that pass leaves to the next."""
        return _recycled(self._one_pass(batch, dropout))

    @torch.no_grad()
    def _recycle(self, batch: Batch, num_passes: int, dropout: DropoutKey | None) -> Recycled:
        """The state after ``num_passes`` passes without gradient (Suppl. Alg. 31)."""
        recycled = self._first_state(batch)
        for index in range(num_passes):
            outputs = self._pass(_slot(batch, index), recycled, _at_pass(dropout, index))
            recycled = _recycled(outputs)
        return recycled

    def _first_state(self, batch: Batch) -> Recycled:
        shape, weights = batch["aatype"].shape, self.input_embedder.preprocess_msa.weights
        wide = at_least_float32(weights.dtype)
        return Recycled(
            weights.new_zeros((*shape, self.c_m)),
            weights.new_zeros((*shape, shape[-1], self.c_z)),
            weights.new_zeros((*shape, 37, 3), dtype=wide),
        )

    def _pass(
        self, batch: Batch, recycled: Recycled, dropout: DropoutKey | None
    ) -> dict[str, Tensor]:
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
    ) -> dict[str, Tensor]:
        """Everything up to the single representation (Suppl. Alg. 2, lines 5-18)."""
        dropout = dropout.enter("evoformer") if dropout else None
        pair_mask = batch["seq_mask"][:, :, None] * batch["seq_mask"][:, None, :]
        msa, pair = self.input_embedder(
            batch["target_feat"], batch["residue_index"], batch["msa_feat"]
        )
        first_row, pair_update = self.recycling_embedder(batch["aatype"], *recycled)
        msa = torch.cat([msa[:, :1] + first_row[:, None], msa[:, 1:]], dim=1)
        pair = pair + pair_update
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
        self, batch: Batch, pair: Tensor, pair_mask: Tensor, dropout: DropoutKey | None
    ) -> Float[Tensor, "b i j c_z"]:
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
        self, batch: Batch, pair: Tensor, pair_mask: Tensor, dropout: DropoutKey | None
    ) -> Float[Tensor, "b i j c_z"]:
        extra = self.extra_msa_embedder(
            batch["extra_msa"], batch["extra_has_deletion"], batch["extra_deletion_value"]
        )
        return self.extra_msa_stack(extra, pair, batch["extra_msa_mask"], pair_mask, dropout)

    def _with_template_rows(
        self, batch: Batch, msa: Float[Tensor, "b s r c_m"]
    ) -> tuple[Float[Tensor, "b s_t r c_m"], Float[Tensor, "b s_t r"]]:
        """The MSA and its mask, with a row for each template's torsions at the end."""
        if not self.templates_enabled:
            return msa, batch["msa_mask"]
        rows, mask = self.template_angle_embedder(
            batch["template_aatype"],
            batch["template_all_atom_positions"],
            batch["template_all_atom_masks"],
        )
        msa_mask = torch.cat([batch["msa_mask"], mask.to(batch["msa_mask"].dtype)], dim=1)
        return torch.cat([msa, rows], dim=1), msa_mask

    def _heads(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = {
            "distogram_logits": self.distogram_head(outputs["pair"]),
            "masked_msa_logits": self.masked_msa_head(outputs["msa"]),
            "experimentally_resolved_logits": self.experimentally_resolved_head(outputs["single"]),
            "plddt_logits": self.predicted_lddt_head(outputs["structure_module_single"]),
        }
        if self.pae_enabled:
            logits["aligned_error_logits"] = self.predicted_aligned_error_head(outputs["pair"])
        return logits


def _recycled(outputs: Mapping[str, Tensor]) -> Recycled:
    return Recycled(outputs["msa_first_row"], outputs["pair"], outputs["final_atom37_positions"])


def _slot(batch: Batch, index: int) -> dict[str, Tensor]:
    """The batch of one pass: its own MSA sample, everything else as it is."""
    return {name: x[:, index] if name in RESAMPLED else x for name, x in batch.items()}


def _at_pass(dropout: DropoutKey | None, index: Tensor | int) -> DropoutKey | None:
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
