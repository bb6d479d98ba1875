"""A vision-language model under a plan: a pruned prefill, and decoding that continues it; owns the loop, not the layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ivtp.backbones.family import PruneOptions, shape_of
from ivtp.backbones.hooks.attention_interface import cache_argument, check_kernel
from ivtp.backbones.hooks.packed_linear import PackedLinear
from ivtp.backbones.hooks.replacing import Latest, replaced
from ivtp.backbones.language.cache import Origin, fill, join
from ivtp.backbones.language.llama import Prefilled, PromptTokens, compiled, prefill
from ivtp.backbones.text.pairing import guide_for
from ivtp.backbones.vlm.adapter import VLMAdapter
from ivtp.backbones.vlm.call import Call, PrunedOutput, decode
from ivtp.backbones.vlm.generation import generating
from ivtp.backbones.vlm.guidance import Guidance
from ivtp.backbones.vlm.prompts import ImageSlots, Prompts, assemble, images_of_prompts
from ivtp.backbones.vlm.trace import Trace, merged, pad_left
from ivtp.backbones.vlm.vision_pass import VisionPass
from ivtp.core.loop import Kept
from ivtp.core.plan import Plan
from ivtp.pruners.default_layers import part1_layers


@contextmanager
def pruned(model: Any, adapter: VLMAdapter, planner: Any, options: PruneOptions) -> Iterator[PrunedModel]:
    """Context in which the forward of a model, and the methods of `generate` around it, are those of a pruned one."""
    outline = planner.outline
    if outline.position_ids == "renumber" and not adapter.renumbers:
        raise ValueError(
            "position_ids='renumber' would take the rows and columns out of M-RoPE; use position_ids='keep' with this model"
        )
    for stage, config in ((outline.vision, model.config.vision_config), (outline.language, model.config.text_config)):
        check_kernel(config._attn_implementation, biased=bool(stage and stage.proportional))
    run = PrunedModel(model, adapter, planner, options)
    with replaced(model.model, forward=run.forward), generating(model, outline):
        yield run


class PrunedModel:
    """Replacement for the forward of a model (without its LM head) while a plan is in force.

    planner       gives the plan for an image, and for all images of a prompt
    vision_batch  crops that go through the tower at once; None: all of a batch
    """

    trace = Latest(Trace())

    def __init__(self, model: Any, adapter: VLMAdapter, planner: Any, options: PruneOptions) -> None:
        self.model, self.adapter, self.planner, self.options = model, adapter, planner, options
        self.plan: Plan = planner.outline
        self.core = model.model
        self.decoder = self.core.language_model
        self.image_token_id = model.config.image_token_id
        self.vision_batch: int | None = None
        self.origin = Origin(weakref.ref(self.decoder), planner)
        self.read_at = 0
        if options.read_early:
            self.read_at = (self.plan.part1 if self.plan.language else 0) or part1_layers(shape_of(model))
        guide = None
        if self.plan.needs_guide:
            guide = guide_for(model, self.plan.reads_text)
            instruction = options.instruction
            guide.instructions = [instruction] if isinstance(instruction, str) else instruction
            if options.text_encoder is not None:
                guide.encoder = options.text_encoder
        self.guidance = Guidance(adapter, self.core.get_input_embeddings(), guide, options)
        self.prefill: Callable[..., Prefilled] = prefill

    def compile(self, how: str | Mapping = "default") -> None:
        """Run the language model's part of every prefill as one graph of torch.compile, with equal outputs; `how`: its
        mode ("default", "reduce-overhead": CUDA graphs), or its arguments by name.

        Every method, batch size and length of prompt is compiled once. Raises ValueError where parts are timed or weights
        packed, and, in the prefill, for a method that cannot be one graph.
        """
        if self.options.part is not nullcontext:
            raise ValueError(
                f"compile={how}: one graph has no parts to be told apart; leave part= out, or do not compile"
            )
        if any(isinstance(layer, PackedLinear) for layer in self.decoder.modules()):
            raise ValueError(f"compile={how}: torch.compile cannot read packed weights; load the model without pack")
        self.prefill = compiled(how)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        **inputs,
    ) -> PrunedOutput:
        """The model's own forward, pruned; hidden states are as short as the pruning left them."""
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds}
        call = Call.of(self.core, input_ids, attention_mask, position_ids, inputs)
        if call.cache is not None and call.cache.get_seq_length() > 0:
            renumber = self.plan.position_ids == "renumber"
            return decode(call, call.cache, self.core, self.adapter, self.origin, renumber)
        return self._prefill(call)

    def _prefill(self, call: Call) -> PrunedOutput:
        """Encode the images, run the prompts through the decoder in groups, and fill the cache."""
        ids, options = call.input_ids, self.options
        images, assigned, start = images_of_prompts(self.adapter, self.image_token_id, ids, call.inputs)
        prompts = Prompts.of(call, self.adapter, self.plan.language is not None or self.read_at > 0, start)
        tower = VisionPass(self.adapter, self.planner, self.vision_batch, options.part, options.vision_cache)
        encoded, vision = tower.encode(images)

        groups: dict[tuple, list[int]] = {}
        for prompt, numbers in enumerate(assigned):
            groups.setdefault(tuple(images[i].kind for i in numbers), []).append(prompt)
        remembers = call.cache is not None
        if len(groups) == 1:
            output, trace = self._read(prompts, ImageSlots.of(encoded, assigned), remembers)
            hidden, memory, keys = output.hidden, output.memory, output.keys
        else:
            # Prompts with images of other kinds run apart: within a group every count of tokens is equal, in every
            # method, and no result depends on the other prompts of the batch.
            outputs, traces = [], []
            for numbers in groups.values():
                slots = ImageSlots.of(encoded, [assigned[number] for number in numbers])
                output, trace = self._read(prompts.group(numbers), slots, remembers)
                outputs.append(output)
                traces.append(trace)
            order = torch.tensor([row for numbers in groups.values() for row in numbers], device=ids.device).argsort()
            hidden = pad_left([output.hidden for output in outputs], 1)[order]
            memory, keys = join([output.memory for output in outputs], [output.keys for output in outputs], order)
            trace = merged(traces, [len(numbers) for numbers in groups.values()], order)
        self.trace = replace(trace, vision=vision)
        if call.cache is not None:
            image = (ids == self.image_token_id) & prompts.valid
            fill(call.cache, memory, keys, prompts.positions, image, prompts.valid, self.origin)
        features = encoded[0].features if len(encoded) == 1 else None  # of images that are all of one kind
        return PrunedOutput(
            last_hidden_state=hidden,
            **cache_argument(call.cache),
            image_hidden_states=features,
            image_outputs=None if features is None else BaseModelOutputWithPooling(pooler_output=features),
            rope_deltas=getattr(self.core, "rope_deltas", None),
        )

    def _read(self, prompts: Prompts, slots: ImageSlots | None, remembers: bool) -> tuple[Prefilled, Trace]:
        """Run prompts with images of the same kinds through the decoder."""
        plan, count = Plan(), 0
        if slots is not None:
            plan, count = self.planner.prompt([encoded.layout.shape for encoded, _ in slots.images]), slots.count
        image = prompts.image_tokens(self.image_token_id, count)
        first = torch.zeros_like(prompts.input_ids[:, :1]) if slots is None else image[:, :1]
        embed = self.core.get_input_embeddings()
        tokens, words = assemble(prompts, embed(prompts.input_ids), image, slots, self.adapter.separator), None
        appended = False
        if slots is not None and plan.cuts_language(tokens.visual_count):
            tokens = self.guidance.rated(plan, tokens, prompts, slots)
            if appended := plan.appends_to(tokens.visual_count):
                reference, words = self.guidance.reference(plan, prompts, slots)
                tokens = tokens.append(reference)
        # One position more, for an appended reference token.
        positions = torch.cat([prompts.positions, prompts.positions[..., -1:] + 1], -1)
        prompt = PromptTokens(tokens, positions, first, appended)
        with self.options.part("language"):
            output = self.prefill(
                self.decoder, self.model.lm_head, plan, prompt, self.read_at, remembers, self.options.part
            )
        return output, language_trace(output, slots, image - first, words)


def language_trace(output: Prefilled, slots: ImageSlots | None, image: Tensor, words: list | None) -> Trace:
    """Trace of a prefill whose cuts count the visual tokens of a prompt; `image`: image tokens as positions count them."""
    cuts, entered, count = output.cuts, None, 0
    if slots is not None:
        ranks, count = image[:, slots.feature_slots], len(slots.feature_slots)
        cuts = [replace(cut, position=torch.searchsorted(ranks, cut.position.contiguous())) for cut in cuts]
        entered = Kept(-1, "block", slots.rank, slots.real)
    return Trace([], cuts, entered, torch.full((len(output.hidden),), count), output.early, words)
