"""The two tokenizers, and which words can be true of a picture."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ivtp.data.scenes import COLORS, KINDS, NUMBERS, PLURALS, VOCABULARY

CONTENT = (*COLORS, *KINDS, *PLURALS.values(), *NUMBERS)
"""Words that are true or false of a picture; all others are function words."""


def _word_level(specials: list[str]) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate((*specials, *VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def language_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, begins with BOS; knows `<image>`."""
    tokenizer = _word_level(["<pad>", "<s>", "</s>", "<unk>", "<image>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word between BOS and EOS, as CLIP's; EOS is not 2, which transformers reads as an old CLIP."""
    tokenizer = _word_level(["<pad>", "<|startoftext|>", "<unk>", "<|endoftext|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", 1), ("<|endoftext|>", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=77,
        clean_up_tokenization_spaces=False,
    )
