"""Tokenizers in real pieces: CLIP's BPE and a Llama-type SentencePiece, restricted to what the data set's words use.

A word is split exactly as by the whole tokenizer; the build checks every one. Other words fall apart into letters.
"""

import gzip
import shutil
from collections.abc import Iterable
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ivtp.data.scenes2.words import vocabulary

SPACE = "▁"
LLAMA_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?!.,;:'\"()$%&/+*=<>#-_"


def derive(symbols: list[str], ranks: dict[tuple[str, str], int]) -> tuple[list[str], list[tuple[str, str]]]:
    """Merge symbols by rank, best first. Returns the pieces and the merges used."""
    used = []
    while len(symbols) > 1:
        pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols))]
        rank, i = min(pairs)
        if rank == len(ranks):
            break
        used.append((symbols[i], symbols[i + 1]))
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]
    return symbols, used


def restrict(words: Iterable[list[str]], ranks: dict[tuple[str, str], int]) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges, in order of rank, that split these words as all merges do."""
    used, pieces = set(), {}
    for symbols in words:
        parts, merges = derive(list(symbols), ranks)
        used.update(merges)
        pieces.update(dict.fromkeys((*symbols, *parts)))
    merges = sorted(used, key=ranks.__getitem__)
    pieces.update(dict.fromkeys(a + b for a, b in merges))
    return list(pieces), merges


def llama() -> PreTrainedTokenizerFast:
    """Mistral's first tokenizer, of Llama's type (SentencePiece BPE); begins with BOS, knows `<image>`."""
    import sentencepiece

    whole = sentencepiece.SentencePieceProcessor(str(files("mistral_common") / "data/tokenizer.model.v1"))
    special = (whole.is_control, whole.is_unknown, whole.is_byte, whole.is_unused)
    ids = [i for i in range(whole.vocab_size()) if not any(is_kind(i) for is_kind in special)]
    scores = {whole.id_to_piece(i): whole.get_score(i) for i in ids}
    order = {piece: i for i, piece in enumerate(sorted(scores, key=lambda p: -scores[p]))}
    splits = [(p[:i], p[i:]) for p in scores for i in range(1, len(p)) if p[:i] in scores and p[i:] in scores]
    ranks = {pair: i for i, pair in enumerate(sorted(splits, key=lambda pair: order[pair[0] + pair[1]]))}
    words = [list(SPACE + word) for word in vocabulary()] + [
        [letter] for letter in (*ALPHABET, SPACE) if letter in scores
    ]
    pieces, merges = restrict(words, ranks)
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate((*LLAMA_SPECIALS, *pieces))}, merges, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
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
    for word in vocabulary():
        ours, theirs = fast.tokenize(word), whole.encode(word, out_type=str)
        if ours != theirs:
            raise ValueError(f"Llama-type pieces of {word!r}: {ours}, but the whole tokenizer gives {theirs}")
    return fast


def clip() -> PreTrainedTokenizerFast:
    """CLIP's BPE between start and end marks; padded with the end mark, as CLIP is."""
    import open_clip

    path = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    ranks = {tuple(line.split()): i for i, line in enumerate(lines)}
    words = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary()]
    words += [[form] for letter in ALPHABET.lower() for form in (letter, letter + "</w>")]
    pieces, merges = restrict(words, ranks)
    tokenizer = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate((*pieces, *CLIP_SPECIALS))},
            merges,
            unk_token="<|endoftext|>",
            end_of_word_suffix="</w>",
            continuing_subword_prefix="",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    start, end = (len(pieces), len(pieces) + 1)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=77,
        clean_up_tokenization_spaces=False,
    )
    whole = open_clip.tokenizer.SimpleTokenizer()
    for word in vocabulary():
        ours, theirs = fast.tokenize(word), [whole.decoder[i] for i in whole.encode(word)]
        if ours != theirs:
            raise ValueError(f"CLIP pieces of {word!r}: {ours}, but the whole tokenizer gives {theirs}")
    return fast


def write(target: Path) -> None:
    """Write both tokenizers below the assets' folder."""
    for name, tokenizer in (("llama", llama()), ("clip", clip())):
        shutil.rmtree(target / name, ignore_errors=True)
        tokenizer.save_pretrained(target / name)
        words = [len(tokenizer.tokenize(word)) for word in vocabulary()]
        print(f"{name}: {len(tokenizer)} pieces, {sum(n > 1 for n in words)} of {len(words)} words are split")
