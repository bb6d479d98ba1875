"""A vision-language model under a plan: prompts, placeholders, decoder, cache; owns the loop, not the layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from ivtp.backbones.language import compiled, prefill
from ivtp.backbones.llama import Llama
from ivtp.backbones.looks import Seen, look, looks_of
from ivtp.backbones.packed import PackedLinear
from ivtp.backbones.pictures import Front, Picture
from ivtp.backbones.pruned_cache import (
    Keys,
    Memory,
    Origin,
    behind,
    check_continuation,
    check_positions,
    check_prompt_mask,
    fill,
    join,
    newly_hidden,
    next_position,
)
from ivtp.backbones.replacing import Latest
from ivtp.backbones.shared import SharedVision
from ivtp.backbones.trace import Trace, merged, pad_left
from ivtp.backbones.transformers_attention import CACHE
from ivtp.pruning.instruction import pseudo_cls, raters
from ivtp.pruning.pruner import Plan
from ivtp.pruning.scores import mix
from ivtp.pruning.tokens import Facts, Selection, Tokens, put
from ivtp.pruning.traverse import Kept, traverse
from ivtp.registry import UserError


@dataclass
class PrunedOutput(ModelOutput):
    """What the LM heads of all families ask for; `cache`, `image_outputs` and `video_outputs` from transformers 5.24 on."""

    last_hidden_state: Tensor | None = None
    past_key_values: DynamicCache | None = None
    cache: DynamicCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    image_outputs: ModelOutput | None = None
    video_hidden_states: Tensor | None = None
    video_outputs: ModelOutput | None = None
    rope_deltas: Tensor | None = None  # of transformers before 5.23


class PrunedModel:
    """Stands in for the forward of a model (without its LM head) while a plan is in force.

    planner   gives the plan for an image, and for all images of a prompt
    guide     callable (input_ids, valid, visual_cls) → relevance "b n" and words; needed for the pseudo CLS only
    read_at   number of layers after which `Trace.early` is read out; 0: never
    part      entered around each part of the work: "vision", "projector", "text_encoder", "language", "pruner"
    shared    keeps what the tower answers for other plans; None: every plan looks for itself
    truth     for an oracle: "b v", True on the visual tokens that each question is about
    """

    trace = Latest(Trace())

    def __init__(
        self,
        model: nn.Module,
        front: Front,
        planner,
        guide: Callable | None = None,
        read_at: int = 0,
        part: Callable[[str], AbstractContextManager] = nullcontext,
        shared: SharedVision | None = None,
        truth: Tensor | None = None,
    ) -> None:
        self.model, self.front, self.planner, self.plan = model, front, planner, planner.outline
        self.guide, self.read_at, self.part, self.shared, self.truth = guide, read_at, part, shared, truth
        self.core = model.model
        self.decoder = self.core.language_model
        self.vision_batch: int | None = None
        """Crops that go through the tower at once; None: all of a batch."""
        self.prefill = prefill
        self.origin = Origin(weakref.ref(self.decoder), planner)
        if self.plan.needs_guide and guide is None:
            raise ValueError(
                "this plan reads the instruction with CLIP and needs the model's processor and CLIP text encoder: load the model "
                "with ivtp.load_model, or pass processor= and text_encoder= to ivtp.load_model for a model you have"
            )

    def compile(self, how: str | Mapping = "default") -> None:
        """Run the language model's part of every prefill as one graph of torch.compile, with equal outputs; `how`: its
        mode ("default", "reduce-overhead": CUDA graphs), or its arguments by name.

        Every method, batch size and length of prompt is compiled once. Raises ValueError where parts are timed or weights
        packed, and, in the prefill, for a method that cannot be one graph.
        """
        if self.part is not nullcontext:
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
        use_cache: bool | None = None,
        cache: DynamicCache | None = None,
        **inputs,
    ) -> PrunedOutput:
        """The signature of the model's own forward; hidden states come back as short as the pruning left them."""
        cache = past_key_values if cache is None else cache
        for wish in ("output_attentions", "output_hidden_states"):
            if inputs.get(wish, getattr(self.model.config, wish, False)):
                raise UserError(
                    f"{wish}=True: layers have different lengths under pruning; use the run's trace instead"
                )
        for wish in (
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "mm_encoder_outputs",
            "vision_aspect_ratio",
        ):
            if inputs.get(wish) not in (None, getattr(self.model.config, wish, None)):
                raise UserError(f"{wish} is not read by a pruned forward; set it in the model's config or leave it out")
        if inputs.get("pixel_values_videos") is not None:
            raise UserError("videos cannot be pruned here; give their frames as images")
        if inputs_embeds is not None or input_ids is None:
            raise UserError("under pruning, give input_ids: the image tokens cannot be found in inputs_embeds")
        if use_cache is None:
            use_cache = self.decoder.config.use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.decoder.config)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise UserError(
                f"{type(cache).__name__}: pruning leaves a different length in each layer, which only DynamicCache can "
                "hold; leave cache_implementation out, or use 'dynamic' or 'offloaded'"
            )
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
            raise UserError("under pruning, attention_mask must have one row per prompt and one column per token")
        if cache is not None and cache.get_seq_length() > 0:
            return self._decode(input_ids, attention_mask, position_ids, cache, inputs)
        return self._prefill(input_ids, attention_mask, position_ids, cache, inputs)

    def _prefill(self, input_ids, attention_mask, position_ids, cache, inputs) -> PrunedOutput:
        check_prompt_mask(input_ids, attention_mask)
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        padded = attention_mask is not None and not bool(valid.all())
        if padded and (self.plan.language is not None or self.read_at) and not bool(valid[:, -1].all()):
            raise UserError(
                "a prompt ends in padding, but its last token is needed; pad on the left (tokenizer.padding_side='left')"
            )
        pictures, held = self._pictures(input_ids, inputs)
        looks, vision = look(self.front, self.planner, pictures, self.vision_batch, self.part, self.shared)
        positions = self.front.positions(input_ids, attention_mask, position_ids, inputs)

        groups: dict[tuple, list[int]] = {}
        for prompt, numbers in enumerate(held):
            groups.setdefault(tuple(pictures[i].kind for i in numbers), []).append(prompt)
        remembers = cache is not None
        if len(groups) == 1:
            (rows,) = groups.values()
            hidden, memory, keys, trace = self._read(input_ids, valid, padded, positions, rows, held, looks, remembers)
        else:
            # Prompts with other images than their neighbours' go through by themselves: every count of tokens is then
            # the same for all of a batch, in every method, and nothing depends on who else is in it.
            parts = []
            for rows in groups.values():
                start = int(valid[rows].any(0).int().argmax())
                index = torch.tensor(rows, device=input_ids.device)
                own_valid = valid[index, start:]
                own_padded = padded and not bool(own_valid.all())
                shown = input_ids[index, start:], own_valid, own_padded, positions[..., index, start:]
                parts.append(self._read(*shown, rows, held, looks, remembers, copied=True))
            hiddens, memories, keys, traces = zip(*parts, strict=True)
            order = torch.tensor([row for rows in groups.values() for row in rows], device=input_ids.device).argsort()
            hidden = pad_left(hiddens, 1)[order]
            memory, keys = join(memories, keys, order)
            trace = merged(traces, [len(rows) for rows in groups.values()], order)
        self.trace = replace(trace, vision=vision)
        if cache is not None:
            image = (input_ids == self.model.config.image_token_id) & valid
            fill(cache, memory, keys, positions, image, valid, self.origin)
        whole = next(iter(looks.values()))[1].features if len(looks) == 1 else None
        return PrunedOutput(
            last_hidden_state=hidden,
            **{CACHE: cache},
            image_hidden_states=whole,
            image_outputs=None if whole is None else BaseModelOutputWithPooling(pooler_output=whole),
            rope_deltas=getattr(self.core, "rope_deltas", None),
        )

    def _decode(self, input_ids, attention_mask, position_ids, cache, inputs) -> PrunedOutput:
        """Text that follows what the cache holds; no plan is asked, since only images are pruned."""
        if inputs.get("pixel_values") is not None:
            raise UserError(
                "pixel_values with a key-value cache: only a conversation's first call can bring images; leave "
                f"pixel_values out if the cache holds them, or give the whole conversation without {CACHE}"
            )
        check_continuation(cache, self.origin, input_ids, attention_mask)
        n = input_ids.shape[1]
        valid = (
            torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask[:, -n:].bool()
        )
        hidden = None if attention_mask is None else newly_hidden(cache, attention_mask)
        following = next_position(cache)
        if hidden is not None and not (self.front.counts_padding and position_ids is None):
            following = following - hidden.sum(1, keepdim=True)
        if position_ids is not None:
            check_positions(position_ids, valid, following)
        elif self.front.counts_padding:
            position_ids = following + torch.arange(n, device=input_ids.device)
        else:
            position_ids = following + valid.cumsum(1) - 1
        rope = self.front.positions(input_ids, None, position_ids, {})
        if hidden is not None:
            for layer in cache.layers:
                layer.hide(hidden)
        # Asked of the new tokens only where the answer matters: a GPU makes all wait for it.
        padded = attention_mask is not None and (cache.layers[0].keys_seen.padded or not bool(valid.all()))
        nothing = torch.zeros_like(valid)
        facts = Facts(0, padded, lone=False)
        tokens = Tokens.of(self._embed(input_ids), nothing, nothing, valid=valid, facts=facts)
        renumber = self.plan.position_ids == "renumber"
        stack = Llama(self.decoder, cache, renumber=renumber, rope=lambda position: rope)
        tokens, _ = traverse(stack, tokens)
        cache.layers[0].shift = torch.maximum(following, behind(rope)) - cache.get_seq_length()
        return PrunedOutput(last_hidden_state=self.decoder.norm(tokens.x), **{CACHE: cache})

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self.core.get_input_embeddings()(input_ids)

    def _pictures(self, input_ids: Tensor, inputs: dict) -> tuple[list[Picture], list[list[int]]]:
        """The images of a batch, and the numbers of those of each prompt. `generate` repeats prompts for its beams, but
        not their images."""
        beams = inputs.get("beams", 1)
        prompts = input_ids[::beams]
        pictures = self.front.pictures(prompts, inputs)
        held = self._share_out(prompts, pictures)
        if beams == 1:
            return pictures, held
        pictures = [pictures[i] for own in held for _ in range(beams) for i in own]
        return pictures, self._share_out(input_ids, pictures)

    def _share_out(self, input_ids: Tensor, pictures: Sequence[Picture]) -> list[list[int]]:
        """Numbers of the pictures of each prompt, in order: as many as fill its image tokens."""
        sizes = [len(self.front.layout(picture.kind).slots) for picture in pictures]
        counts = (input_ids == self.model.config.image_token_id).sum(1).tolist()
        held, number = [], 0
        for prompt, count in enumerate(counts):
            own, left = [], count
            while left > 0 and number < len(pictures):
                own.append(number)
                left -= sizes[number]
                number += 1
            if left:
                makes = " + ".join(str(sizes[i]) for i in own) or "none is left"
                raise ValueError(
                    f"prompt {prompt} of the batch has {count} image tokens, but its images make {makes}; let the "
                    "processor write the prompts, one image token for each image"
                )
            held.append(own)
        if number < len(pictures):
            raise ValueError(
                f"{len(pictures)} images, but the {len(counts)} prompts have image tokens for {number}; give every image "
                "its place in a prompt"
            )
        return held

    def _read(
        self, input_ids, valid, padded, positions, rows, held, looks, remembers: bool, copied: bool = False
    ) -> tuple[Tensor, Memory, list[Keys], Trace]:
        """The language model over prompts with images of the same kinds: hidden states, keys and values per layer (in
        memory of their own if `copied`: a CUDA graph writes over its own), which of them are real, and the trace."""
        seen = Seen.of([[looks_of(looks, i) for i in held[row]] for row in rows])
        plan = self.planner.prompt([look.layout.shape for look, _ in seen.looks]) if seen.looks else Plan()
        trace = Trace()
        image = (input_ids != self.model.config.image_token_id).byte().argsort(dim=1, stable=True)[:, : seen.places]
        first = image[:, :1] if seen.looks else torch.zeros_like(input_ids[:, :1])
        place = torch.arange(input_ids.shape[1], device=input_ids.device) - first
        tokens = self._fill(input_ids, place, valid, padded, image, seen)
        if plan.cuts_language(tokens.visual_count):
            if plan.reads_truth:
                tokens = replace(tokens, relevance=self._truth(rows, len(held), tokens, seen))
            if plan.reads_relevance:
                tokens = replace(tokens, relevance=self._relevance(input_ids, valid, rows, len(held), tokens, seen))
            if plan.reference == "raters":
                with self.part("pruner"):
                    tokens = replace(tokens, reference=raters(tokens), facts=replace(tokens.facts, lone=False))
        appends = plan.appends_to(tokens.visual_count)
        if appends:
            reference, words = self._reference(plan, input_ids, valid, rows, len(held), seen)
            tokens, trace = tokens.append(reference), replace(trace, words=words)

        longer = torch.cat([positions, positions[..., -1:] + 1], -1)  # of an appended reference too
        with self.part("language"):
            told = tokens, longer, first, appends, self.read_at, remembers, self.part
            made = self.prefill(self.decoder, self.model.lm_head, plan, *told)
            memory = [(k.clone(), v.clone()) for k, v in made.memory] if copied else made.memory
        cuts = made.cuts
        if seen.looks:
            ranks = (image - first)[:, seen.carrying]
            cuts = [replace(cut, position=torch.searchsorted(ranks, cut.position.contiguous())) for cut in cuts]
        visual = torch.full((len(rows),), len(seen.carrying) if seen.looks else 0)
        entered = Kept(-1, "block", seen.rank, seen.real) if seen.looks else None
        trace = replace(trace, language=cuts, entered=entered, visual=visual, early=made.early)
        return made.hidden, memory, made.keys, trace

    def _fill(self, input_ids, place, valid, padded, image, seen: Seen) -> Tokens:
        """The prompt with the surviving features at their places; the placeholders of the others are gone."""
        x = self._embed(input_ids)
        last = torch.arange(input_ids.shape[1], device=input_ids.device)[None] == input_ids.shape[1] - 1
        ids = (input_ids * valid).long()
        words = mix((ids * (2 * place + 1)).sum(1))
        nothing = torch.zeros_like(valid)
        if not seen.looks:
            known = {"position": place, "valid": valid, "sample": mix(words), "facts": Facts(0, padded)}
            return Tokens.of(x, visual=nothing, reference=last, **known)
        if len(seen.separators):
            fixed = image[:, seen.separators]
            separator = self.front.separator.to(x)
            x = put(x, fixed, separator.expand(*fixed.shape, -1))
        visual = image[:, seen.carrying]
        tokens = Tokens.of(
            x,
            visual=nothing.scatter(1, visual, True),
            reference=last,
            position=place,
            valid=valid,
            sample=mix(seen.sample + words),
            facts=Facts(visual.shape[1], padded),
        )
        real = None if not seen.ragged or bool(seen.real.all()) else seen.real
        if seen.rank.shape[1] == visual.shape[1] and real is None:
            tokens = tokens.with_x(put(x, visual, seen.features))
        else:
            tokens = tokens.keep(Selection(seen.rank, valid=real), lambda *_: (seen.features, seen.size), None)
        if seen.taps is not None:
            blank = tokens.x.new_zeros(*tokens.x.shape[:2], seen.taps.shape[2])
            tokens = replace(tokens, feature=put(blank, tokens.visual_index, seen.taps))
        return tokens

    def _reference(self, plan: Plan, input_ids, valid, rows, batch: int, seen: Seen) -> tuple[Tensor, list | None]:
        """The token appended for part 1 (Eq. 8): the pseudo CLS, or the projected visual CLS; and the words."""
        with self.part("text_encoder"):
            visual_cls = self.front.project(seen.cls[0][:, None])[:, 0]
            if plan.reference == "visual_cls":
                return visual_cls, None
            x = self._embed(input_ids)
            if plan.reads_clip:
                relevance, words = self.guide(input_ids, valid, seen.cls[1], (rows, batch))
            else:
                fit = torch.cosine_similarity(x.float(), visual_cls[:, None].float(), dim=-1)
                relevance, words = self.guide.spelled_out(input_ids, valid, fit, (rows, batch))
            return pseudo_cls(x, relevance, plan.tau, visual_cls, plan.words), words

    def _truth(self, rows: Sequence[int], batch: int, tokens: Tokens, seen: Seen) -> Tensor:
        """1 where a surviving image token lies on what the question is about "b n"."""
        total = len(seen.carrying)
        if self.truth is None or batch % len(self.truth) or self.truth.shape[1] != total:
            given = None if self.truth is None else tuple(self.truth.shape)
            raise ValueError(
                f"this plan keeps what each question is about and must be told by truth=, one row of {total} "
                f"true or false per prompt ({batch}), but truth is {given}"
            )
        truth = self.truth.to(tokens.x.device).repeat_interleave(batch // len(self.truth), 0)[rows]
        truth = truth.to(tokens.size.dtype).gather(1, seen.rank)
        return torch.zeros_like(tokens.size).scatter(1, tokens.visual_index, truth)

    def _relevance(self, input_ids, valid, rows, batch: int, tokens: Tokens, seen: Seen) -> Tensor:
        """The fit of every image token to the instruction, at its place in the prompt "b n"."""
        with self.part("text_encoder"):
            fit = self.guide.fit(input_ids, valid, seen.joint(), (rows, batch))
        return torch.zeros_like(tokens.size).scatter(1, tokens.visual_index, fit.to(tokens.size.dtype))
