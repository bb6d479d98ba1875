"""LLaVA: tower, projector, placeholders, decoder, with a plan for both sites."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from ivtp.backbones import ModelError, replaced
from ivtp.backbones.clip_vit import ClipVit, sample_number
from ivtp.backbones.clip_vit import shape as clip_shape
from ivtp.backbones.companions import guide_for, text_sizes
from ivtp.backbones.llama import Llama
from ivtp.backbones.shared import SharedVision
from ivtp.pruning.cost import Layers, Shape
from ivtp.pruning.instruction import pseudo_cls, raters
from ivtp.pruning.pruner import Plan
from ivtp.pruning.scores import mix
from ivtp.pruning.tokens import Selection, Tokens, put
from ivtp.pruning.traverse import Kept, traverse


@dataclass
class Trace:
    """What happened in the last prefill.

    vision, language  one entry per cut; positions are patch indices in the image, on both sites
    early             logits "b vocabulary" read out at the end of part 1 through the final norm and the LM head
    words             per sample: (text, relevance) of every instruction token, when guidance was used
    """

    vision: list[Kept] = field(default_factory=list)
    language: list[Kept] = field(default_factory=list)
    early: Tensor | None = None
    words: list[list[tuple[str, float]]] | None = None

    @property
    def kept(self) -> Kept | None:
        """The last cut of all."""
        cuts = [*self.vision, *self.language]
        return cuts[-1] if cuts else None


class PrunedLlava:
    """Stands in for the forward of a `LlavaModel` while a plan is in force; owns the loop, not the layers.

    guide     callable (input_ids, valid, visual_cls) → relevance "b n" and words; needed for the pseudo CLS only
    read_at   number of layers after which `Trace.early` is read out; 0: never
    part      entered around each part of the work: "vision", "projector", "text_encoder", "language", "pruner"
    shared    keeps what the tower answers for other plans; None: every plan looks for itself
    truth     for an oracle: "b v", True on the patches that each question is about
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        guide: Callable | None = None,
        read_at: int = 0,
        part: Callable[[str], AbstractContextManager] = nullcontext,
        shared: SharedVision | None = None,
        truth: Tensor | None = None,
    ) -> None:
        self.model, self.plan, self.guide, self.read_at, self.part = model, plan, guide, read_at, part
        self.shared, self.truth = shared, truth
        self.llava = model.model
        self.config = model.config
        self.trace = Trace()
        # For every cache that a prefill filled: which keys of each layer are real, and the next position; a cache that
        # is gone takes it along.
        self._filled: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        if plan.needs_guide and guide is None:
            raise ValueError(
                "this plan reads the instruction with CLIP and needs the model's processor and CLIP text encoder: load the model "
                "with ivtp.load_model, or pass processor= and text_encoder= to ivtp.load_model for a model you have"
            )

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **unused,
    ) -> LlavaModelOutputWithPast:
        """The signature of `LlavaModel.forward`; hidden states come back as short as the pruning left them."""
        for wish in ("output_attentions", "output_hidden_states"):
            if unused.get(wish):
                raise ValueError(
                    f"{wish}=True: layers have different lengths under pruning; use the run's trace instead"
                )
        for wish in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes", "mm_encoder_outputs"):
            if unused.get(wish) is not None:
                raise ValueError(
                    f"{wish} is not read by a pruned forward; set it in the model's config or leave it out"
                )
        if inputs_embeds is not None or input_ids is None:
            raise ValueError("under pruning, give input_ids: the image tokens cannot be found in inputs_embeds")
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return self._decode(input_ids, attention_mask, position_ids, past_key_values)
        if use_cache is None:
            use_cache = self.llava.language_model.config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.llava.language_model.config)
        if past_key_values is not None and not isinstance(past_key_values, DynamicCache):
            raise ValueError(
                f"{type(past_key_values).__name__} has one length for all layers, but pruning leaves a different one in "
                "each; use the default cache_implementation='dynamic'"
            )
        return self._prefill(input_ids, pixel_values, attention_mask, position_ids, past_key_values)

    def _prefill(self, input_ids, pixel_values, attention_mask, position_ids, cache) -> LlavaModelOutputWithPast:
        self.trace = Trace()
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if not bool(valid[:, -1].all()) and (self.plan.language is not None or self.read_at):
            raise ValueError(
                "a prompt ends in padding, but its last token is needed; pad on the left (tokenizer.padding_side='left')"
            )
        placeholders = self._placeholders(input_ids, pixel_values)
        with self.part("vision"):
            seen, cls_feature, cls_last = self._see(pixel_values)
        with self.part("projector"):
            features = self.llava.multi_modal_projector(seen.of_visual(seen.feature))

        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        first = position_ids.gather(1, placeholders[:, :1])  # where patch 0 stands; tokens count from there
        tokens = self._fill(input_ids, position_ids - first, valid, placeholders, seen, features)
        if self.plan.language is not None and self.plan.cuts_language(tokens.visual_count):
            if self.plan.reads_truth:
                tokens = replace(tokens, relevance=self._truth(seen, tokens))
            if self.plan.reads_relevance:
                tokens = replace(tokens, relevance=self._relevance(input_ids, valid, seen, tokens))
            if self.plan.reference == "raters":
                with self.part("pruner"):
                    tokens = replace(tokens, reference=raters(tokens))
        appends = self.plan.appends_to(tokens.visual_count)
        if appends:
            tokens = tokens.append(self._reference(input_ids, valid, cls_feature, cls_last))

        stack = Llama(self.llava.language_model, cache, renumber=self.plan.position_ids == "renumber", origin=first)
        stack.part1 = self.plan.part1 if appends else self.read_at
        stack.on_part1 = lambda tokens: self._end_part1(stack, tokens, appends) if stack.part1 else tokens
        with self.part("language"):
            tokens, cuts = traverse(stack, tokens, self.plan.language, self.part)
            hidden = self.llava.language_model.norm(tokens.x)
        self.trace.language = cuts
        if cache is not None:
            self._filled[cache] = stack.valid, position_ids[:, -1:] + 1
        return LlavaModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, image_hidden_states=features)

    def _decode(self, input_ids, attention_mask, position_ids, cache) -> LlavaModelOutputWithPast:
        if cache not in self._filled:
            raise ValueError("this key-value cache was not filled under the pruning that is in force; prefill it here")
        earlier, following = self._filled[cache]
        valid = torch.ones_like(input_ids, dtype=torch.bool)
        if position_ids is None:
            position_ids = following + torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.llava.get_input_embeddings()(input_ids)
        tokens = Tokens.of(x, torch.zeros_like(valid), torch.zeros_like(valid), position=position_ids, valid=valid)
        stack = Llama(self.llava.language_model, cache, earlier, renumber=self.plan.position_ids == "renumber")
        tokens, _ = traverse(stack, tokens)
        self._filled[cache] = stack.valid, position_ids[:, -1:] + 1
        return LlavaModelOutputWithPast(
            last_hidden_state=self.llava.language_model.norm(tokens.x), past_key_values=cache
        )

    def _placeholders(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """Where the image tokens of each prompt stand, "b v"."""
        image = input_ids == self.config.image_token_id
        counts = image.sum(1)
        expected = self._patches
        for sample, count in enumerate(counts.tolist()):
            if count != expected:
                raise ValueError(
                    f"prompt {sample} of the batch has {count} image tokens, but one image makes {expected}; "
                    "each prompt needs exactly one <image> and one image"
                )
        if pixel_values is None or pixel_values.shape[0] != input_ids.shape[0]:
            given = 0 if pixel_values is None else pixel_values.shape[0]
            raise ValueError(f"{input_ids.shape[0]} prompts, but {given} images; each prompt needs exactly one image")
        return image.nonzero()[:, 1].view(input_ids.shape[0], expected)

    def _see(self, pixel_values: Tensor) -> tuple[Tokens, Tensor, Tensor]:
        """The pruned tower: its visual tokens, and the class token at the feature layer and at the end."""
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        depth = self.config.vision_config.num_hidden_layers
        # hidden_states[i] is the input of layer i: hidden_states[-2] leaves layer depth - 2.
        stack = ClipVit(self.llava.vision_tower, tuple(layer % (depth + 1) - 1 for layer in layers))
        if list(stack.features) != sorted(set(stack.features)) or stack.features[0] < 0:
            raise ValueError(
                f"vision_feature_layer={layers}: pruning joins the outputs of different layers in their order; give "
                "them ascending, without the embeddings (0)"
            )
        if self.config.vision_feature_select_strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy={self.config.vision_feature_select_strategy!r} passes the class token "
                "on as an image token; pruning supports 'default' (patches only)"
            )
        # Beams, and several questions about one image, share its pass through the tower.
        numbers = sample_number(pixel_values)
        first, owner = distinct(numbers)

        def look() -> tuple[Tokens, list[Kept], Tensor]:
            tokens = stack.embed(pixel_values[first], self.plan.image)
            tokens, cuts = traverse(stack, tokens, self.plan.vision, self.part)
            return tokens, cuts, stack.tower.post_layernorm(tokens.x[:, 0])

        tokens, cuts, cls = self.shared(self.plan, numbers[first], look) if self.shared else look()
        self.trace.vision = [replace(cut, position=cut.position[owner], valid=cut.valid[owner]) for cut in cuts]
        return tokens.samples(owner), tokens.feature[owner, 0], cls[owner]

    def _fill(self, input_ids, position_ids, valid, placeholders, seen: Tokens, features: Tensor) -> Tokens:
        """The prompt with the surviving features at their places; the placeholders of the others are gone."""
        x = self.llava.get_input_embeddings()(input_ids)
        position, slot = seen.of_visual(seen.position).sort(dim=1)  # raster order, whatever order merging left
        features = features.gather(1, slot[:, :, None].expand_as(features))
        size, real = (seen.of_visual(t).gather(1, slot) for t in (seen.size, seen.valid))
        last = torch.arange(input_ids.shape[1], device=input_ids.device)[None] == input_ids.shape[1] - 1
        ids = (input_ids * valid).long()
        words = mix((ids * (2 * position_ids + 1)).sum(1))
        tokens = Tokens.of(
            x,
            visual=torch.zeros_like(valid).scatter(1, placeholders, True),
            reference=last,
            position=position_ids,
            valid=valid,
            sample=mix(seen.sample + words),
        )
        if position.shape[1] == placeholders.shape[1] and bool(real.all()):
            return tokens.with_x(put(x, placeholders, features))
        return tokens.keep(Selection(position, valid=real), lambda *_: (features, size), None)

    def _reference(self, input_ids: Tensor, valid: Tensor, cls_feature: Tensor, cls_last: Tensor) -> Tensor:
        """The token appended for part 1 (Eq. 8): the pseudo CLS, or the projected visual CLS."""
        with self.part("text_encoder"):
            visual_cls = self.llava.multi_modal_projector(cls_feature[:, None])[:, 0]
            if self.plan.reference == "visual_cls":
                return visual_cls
            x = self.llava.get_input_embeddings()(input_ids)
            if self.plan.reads_clip:
                relevance, self.trace.words = self.guide(input_ids, valid, cls_last)
            else:
                fit = torch.cosine_similarity(x.float(), visual_cls[:, None].float(), dim=-1)
                relevance, self.trace.words = self.guide.spelled_out(input_ids, valid, fit)
            return pseudo_cls(x, relevance, self.plan.tau, visual_cls, self.plan.words)

    def _truth(self, seen: Tokens, tokens: Tokens) -> Tensor:
        """1 where a surviving image token lies on what the question is about "b n"."""
        if self.truth is None or len(tokens.x) % len(self.truth) or self.truth.shape[1] != self._patches:
            given = None if self.truth is None else tuple(self.truth.shape)
            raise ValueError(
                f"this plan keeps what each question is about and must be told by truth=, one row of {self._patches} "
                f"true or false per prompt ({len(tokens.x)}), but truth is {given}"
            )
        truth = self.truth.to(tokens.x.device).repeat_interleave(len(tokens.x) // len(self.truth), 0)
        truth = truth.to(tokens.size.dtype).gather(1, seen.of_visual(seen.position).sort(dim=1).values)
        return torch.zeros_like(tokens.size).scatter(1, tokens.visual_index, truth)

    @property
    def _patches(self) -> int:
        return clip_shape(self.config.vision_config).patches

    def _relevance(self, input_ids: Tensor, valid: Tensor, seen: Tokens, tokens: Tokens) -> Tensor:
        """The fit of every image token to the instruction, at its place in the prompt "b n"."""
        with self.part("text_encoder"):
            tower = getattr(self.llava.vision_tower, "vision_model", self.llava.vision_tower)
            width = self.config.vision_config.hidden_size
            patches = tower.post_layernorm(seen.of_visual(seen.feature)[:, :, -width:])
            fit = self.guide.fit(input_ids, valid, patches)
        fit = fit.gather(1, seen.of_visual(seen.position).argsort(dim=1, stable=True))  # raster order, as in the prompt
        return torch.zeros_like(tokens.size).scatter(1, tokens.visual_index, fit.to(tokens.size.dtype))

    def _end_part1(self, stack: Llama, tokens: Tokens, appended: bool) -> Tokens:
        if appended:
            tokens = tokens.without_last()
            stack.forget_last(stack.part1)
        if self.read_at:
            self.trace.early = self.model.lm_head(self.llava.language_model.norm(tokens.x[:, -1]))
        return tokens


def distinct(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The first place of each different entry, in order, and for every entry which of those it equals."""
    same = numbers[:, None] == numbers[None]
    first = same.int().argmax(1)
    places = first.unique()
    return places, torch.searchsorted(places, first)


def shape(model) -> Shape:
    """Sizes of a LLaVA model or of its config, its paired CLIP text encoder included.

    Raises ModelError for one whose tower or decoder would have to be opened in another way.
    """
    config = getattr(model, "config", model)
    for part, known in (("vision_config", ("clip_vision_model",)), ("text_config", ("llama", "mistral", "qwen2"))):
        kind = getattr(config, part).model_type
        if kind not in known:
            raise ModelError(f"a LLaVA with {part} of type {kind!r} cannot be pruned; supported: {', '.join(known)}")
    if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or ()) or (
        config.text_config.model_type == "mistral" and config.text_config.sliding_window is not None
    ):
        raise ModelError("a decoder with sliding-window attention cannot be pruned; supported: full attention")
    features = config.vision_feature_layer
    language = config.text_config
    heads = language.num_attention_heads
    kv_heads = getattr(language, "num_key_value_heads", None) or heads
    head_width = getattr(language, "head_dim", None) or language.hidden_size // heads
    sizes = Layers(
        language.num_hidden_layers, language.hidden_size, language.intermediate_size, heads, kv_heads, head_width, 3
    )
    return replace(
        clip_shape(config.vision_config),
        projector_in=config.vision_config.hidden_size * (1 if isinstance(features, int) else len(features)),
        language=sizes,
        vocabulary=language.vocab_size,
        **text_sizes(model),
    )


@contextmanager
def prune(
    model: nn.Module,
    plan: Plan,
    instruction,
    read_at: int,
    part,
    shared: SharedVision | None = None,
    truth: Tensor | None = None,
) -> Iterator:
    guide = guide_for(model) if plan.needs_guide else None
    if guide is not None:
        guide.instructions = [instruction] if isinstance(instruction, str) else instruction
    run = PrunedLlava(model, plan, guide, read_at, part, shared, truth)
    # `generate` of newer transformers encodes images by itself before the prefill, unless the model cannot take that.
    whole_prefill = replaced(model, lambda: False, "_supports_mm_encoder_outputs")
    with replaced(model.model, run.forward), whole_prefill:
        yield run
