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
from ivtp.backbones.llama import Keys, Llama
from ivtp.backbones.looks import Seen, look, looks_of
from ivtp.backbones.packed import PackedLinear
from ivtp.backbones.pictures import Front, Picture
from ivtp.backbones.replacing import Latest
from ivtp.backbones.shared import SharedVision
from ivtp.backbones.trace import Trace, merged, pad_left
from ivtp.backbones.transformers_attention import CACHE
from ivtp.pruning.instruction import pseudo_cls, raters
from ivtp.pruning.pruner import Plan
from ivtp.pruning.scores import mix
from ivtp.pruning.tokens import Facts, Selection, Tokens, put
from ivtp.pruning.traverse import Kept, traverse


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
        # For every cache that a prefill filled: which keys of each layer are real, and the next position; a cache that
        # is gone takes it along.
        self._filled: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
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
            if inputs.get(wish):
                raise ValueError(
                    f"{wish}=True: layers have different lengths under pruning; use the run's trace instead"
                )
        for wish in (
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "mm_encoder_outputs",
            "vision_aspect_ratio",
        ):
            if inputs.get(wish) not in (None, getattr(self.model.config, wish, None)):
                raise ValueError(
                    f"{wish} is not read by a pruned forward; set it in the model's config or leave it out"
                )
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError("videos cannot be pruned here; give their frames as images")
        if inputs_embeds is not None or input_ids is None:
            raise ValueError("under pruning, give input_ids: the image tokens cannot be found in inputs_embeds")
        if cache is not None and cache.get_seq_length() > 0:
            return self._decode(input_ids, position_ids, cache)
        if use_cache is None:
            use_cache = self.decoder.config.use_cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.decoder.config)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"{type(cache).__name__} has one length for all layers, but pruning leaves a different one in "
                "each; use the default cache_implementation='dynamic'"
            )
        return self._prefill(input_ids, attention_mask, position_ids, cache, inputs)

    def _prefill(self, input_ids, attention_mask, position_ids, cache, inputs) -> PrunedOutput:
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        padded = attention_mask is not None and not bool(valid.all())
        if padded and (self.plan.language is not None or self.read_at) and not bool(valid[:, -1].all()):
            raise ValueError(
                "a prompt ends in padding, but its last token is needed; pad on the left (tokenizer.padding_side='left')"
            )
        pictures = self.front.pictures(input_ids, inputs)
        held = self._share_out(input_ids, pictures)
        looks, vision = look(self.front, self.planner, pictures, self.vision_batch, self.part, self.shared)
        positions = self.front.positions(input_ids, attention_mask, position_ids, inputs)

        groups: dict[tuple, list[int]] = {}
        for prompt, numbers in enumerate(held):
            groups.setdefault(tuple(pictures[i].kind for i in numbers), []).append(prompt)
        if len(groups) == 1:
            (rows,) = groups.values()
            hidden, filled, trace = self._read(input_ids, valid, padded, positions, rows, held, looks, cache)
        else:
            # Prompts with other images than their neighbours' go through by themselves: every count of tokens is then
            # the same for all of a batch, in every method, and nothing depends on who else is in it.
            parts = []
            for rows in groups.values():
                start = int(valid[rows].any(0).int().argmax())
                index = torch.tensor(rows, device=input_ids.device)
                own = None if cache is None else DynamicCache(config=self.decoder.config)
                own_valid = valid[index, start:]
                own_padded = padded and not bool(own_valid.all())
                shown = input_ids[index, start:], own_valid, own_padded, positions[..., index, start:]
                parts.append((rows, own, *self._read(*shown, rows, held, looks, own)))
            order = torch.tensor([row for part in parts for row in part[0]], device=input_ids.device).argsort()
            hidden = pad_left([part[2] for part in parts], 1)[order]
            filled = join(cache, [part[1] for part in parts], [part[3] for part in parts], order)
            trace = merged([part[4] for part in parts], [len(part[0]) for part in parts], order)
        self.trace = replace(trace, vision=vision)
        if cache is not None:
            self._filled[cache] = filled, positions[..., -1:] + 1
        whole = next(iter(looks.values()))[1].features if len(looks) == 1 else None
        return PrunedOutput(
            last_hidden_state=hidden,
            **{CACHE: cache},
            image_hidden_states=whole,
            image_outputs=None if whole is None else BaseModelOutputWithPooling(pooler_output=whole),
            rope_deltas=getattr(self.core, "rope_deltas", None),
        )

    def _decode(self, input_ids, position_ids, cache) -> PrunedOutput:
        if cache not in self._filled:
            raise ValueError("this key-value cache was not filled under the pruning that is in force; prefill it here")
        earlier, following = self._filled[cache]
        valid = torch.ones_like(input_ids, dtype=torch.bool)
        steps = torch.arange(input_ids.shape[1], device=input_ids.device)
        rope = following + steps if position_ids is None else self.front.positions(input_ids, None, position_ids, {})
        nothing, facts = torch.zeros_like(valid), Facts(0, lone=False)
        tokens = Tokens.of(self._embed(input_ids), nothing, nothing, valid=valid, facts=facts)
        renumber = self.plan.position_ids == "renumber"
        stack = Llama(self.decoder, cache, earlier, renumber=renumber, rope=lambda position: rope)
        tokens, _ = traverse(stack, tokens)
        self._filled[cache] = stack.seen, rope[..., -1:] + 1
        return PrunedOutput(last_hidden_state=self.decoder.norm(tokens.x), **{CACHE: cache})

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self.core.get_input_embeddings()(input_ids)

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

    def _read(self, input_ids, valid, padded, positions, rows, held, looks, cache) -> tuple[Tensor, list[Keys], Trace]:
        """The language model over prompts with images of the same kinds: hidden states, real keys per layer, trace."""
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
            told = tokens, longer, first, appends, self.read_at, cache is not None, self.part
            made = self.prefill(self.decoder, self.model.lm_head, plan, *told)
            if cache is not None:
                for layer, keys_values in enumerate(made.memory):
                    cache.update(*keys_values, layer)
        cuts = made.cuts
        if seen.looks:
            ranks = (image - first)[:, seen.carrying]
            cuts = [replace(cut, position=torch.searchsorted(ranks, cut.position.contiguous())) for cut in cuts]
        visual = torch.full((len(rows),), len(seen.carrying) if seen.looks else 0)
        entered = Kept(-1, "block", seen.rank, seen.real) if seen.looks else None
        trace = replace(trace, language=cuts, entered=entered, visual=visual, early=made.early)
        return made.hidden, made.keys, trace

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


def join(cache, caches: list, keys: list[list[Keys]], order: Tensor) -> list[Keys]:
    """Put the keys and values of several groups of prompts, padded on the left, into one cache; which of them are real."""
    if cache is not None:
        for layer in range(len(keys[0])):
            both = (
                pad_left([getattr(own.layers[layer], name) for own in caches], 2)[order] for name in ("keys", "values")
            )
            cache.update(*both, layer)
    layers = list(zip(*keys, strict=True))
    ragged = [len({found.valid.shape[1] for found in layer}) > 1 for layer in layers]
    return [
        Keys(pad_left([found.valid for found in layer], 1)[order], uneven or any(found.padded for found in layer))
        for layer, uneven in zip(layers, ragged, strict=True)
    ]
