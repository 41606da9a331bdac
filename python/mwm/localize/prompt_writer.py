"""More prompts from a text-generation model of transformers. What it writes is filtered by form only: somebody has to read it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml

from mwm.localize.checkpoints import first_line, hub_answers, local_folder, quiet_transformers
from mwm.localize.prompt_sets import LEVELS, MAX_WORDS, PromptSet, parse_prompt_set
from mwm.localize.protocol import default_device

_WANTED = {
    "P1": "short phrases of two to six words that name {title}",
    "P2": "sentences of ten to twenty-five words that describe how {title} looks in the image, for any of its types",
    "P3": "sentences of ten to twenty-five words that describe how one type of {title} looks in the image",
}
_EXAMPLE = "Qwen/Qwen2.5-0.5B-Instruct"
_ROUNDS = 12
_SHORT = 8  # words of a sentence of level P1
_LEAD = re.compile(r"^\s*(?:[-*•–]|\(?\d{1,3}[.):])\s*")


class PromptWriter:
    """A causal language model that continues a list of example sentences.

    Models with a chat template are asked, others continue the list. Code from checkpoints is never run; weights are read as safetensors only.

    Args:
        model: Hub name or local folder of any text-generation model of transformers. A hub name is fetched where it is not in the local cache.
        device: Where it runs; the first CUDA device where there is one, else the CPU.

    Raises:
        ValueError: it is no such model, is not there, or cannot be read; one sentence.
    """

    def __init__(self, model: str | Path, device: Any = None) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.source, self.device = str(model), default_device(device)
        folder = local_folder(self.source, "prompts", _EXAMPLE)
        options = {"local_files_only": folder is not None or not hub_answers(), "trust_remote_code": False}
        try:
            with quiet_transformers(bars=not options["local_files_only"]):
                self.tokenizer = AutoTokenizer.from_pretrained(folder or self.source, **options)
                self.model = AutoModelForCausalLM.from_pretrained(folder or self.source, use_safetensors=True, **options)
        except Exception as error:
            raise ValueError(f"prompts: model must be a text-generation model of transformers with a tokenizer and weights as safetensors, got {self.source!r} "
                             f"({first_line(error)}). For example {_EXAMPLE}.") from error
        self.model = self.model.to(self.device).eval().requires_grad_(False)

    def write(self, target: PromptSet, level: str = "P2", count: int = 8, seed: int = 0) -> list[str]:
        """New sentences about a target.

        Args:
            target: The set whose sentences are examples, and whose words a sentence must hold one of.
            level: P1, P2 or P3, or a sub-type ("P3/glioma").
            count: How many to write.
            seed: Of the sampling.

        Returns:
            At most `count` sentences, none of which is in the set.

        Raises:
            ValueError: the count is not in 1 … 100, there is no such level, or the model wrote nothing usable.
        """
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 100:
            raise ValueError(f"prompts: count must be a whole number of 1 to 100, got {count!r}.")
        examples = target.sentences(level)
        known = {text.casefold() for kind in target.levels for text in target.sentences(kind)}
        found: list[str] = []
        tokens = self._question(target, level.partition("/")[0], level.partition("/")[2], examples)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for _ in range(_ROUNDS):
                for text in self._lines(tokens):
                    if usable(text, target, level) and text.casefold() not in known:
                        known.add(text.casefold())
                        found.append(text)
                if len(found) >= count:
                    break
        if not found:
            raise ValueError(f"prompts: the model {self.source!r} wrote no sentence that names {target.title} in at most {MAX_WORDS} words. "
                             "Take a larger model, or write the sentences by hand.")
        return found[:count]

    def _question(self, target: PromptSet, level: str, sub: str, examples: list[str]) -> torch.Tensor:
        title = target.title + (f" ({sub.replace('_', ' ')})" if sub else "")
        listed = "\n".join(f"- {text}" for text in examples[:6])
        asked = f"Write {_WANTED[level].format(title=title)}, one per line, each beginning with a hyphen."
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": f"{asked} Radiologists and doctors read them. Examples:\n{listed}\nWrite ten others, and nothing else."}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(self.device)
        return self.tokenizer(f"{asked}\n{listed}\n-", return_tensors="pt")["input_ids"].to(self.device)

    @torch.no_grad()
    def _lines(self, tokens: torch.Tensor) -> list[str]:
        limit = getattr(self.model.config, "max_position_embeddings", None) or 4096
        fresh = min(320, limit // 2)
        tokens = tokens[:, -(limit - fresh) :]  # a short memory keeps the last examples
        end = self.tokenizer.eos_token_id
        answer = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=0.9, top_p=0.95, max_new_tokens=fresh,
                                     pad_token_id=end if end is not None else 0)
        fresh_tokens = answer[0, tokens.shape[1] :]
        lines = self.tokenizer.decode(fresh_tokens, skip_special_tokens=True).splitlines()
        if len(lines) > 1 and len(fresh_tokens) == fresh:  # the last one was cut off
            lines.pop()
        return [clean(line) for line in lines if line.strip()]


def clean(line: str) -> str:
    """A line of a list as a sentence: without bullet, number, quotes and full stop, with single spaces."""
    return " ".join(_LEAD.sub("", line).split()).strip("\"'“”‘’ ").rstrip(".;,")


def usable(text: str, target: PromptSet, level: str = "P2") -> bool:
    """Whether a sentence has a length that text towers read, is plain text, and names the target in one of its set's words."""
    words = text.split()
    if not 1 <= len(words) <= (_SHORT if level.startswith("P1") else MAX_WORDS) or not text.isprintable() or re.search(r"https?:|www\.|[<>{}\[\]|\\]", text):
        return False
    return not target.words or any(word.lower() in text.lower() for word in target.words)


def as_yaml(target: PromptSet, level: str, sentences: list[str], origin: str) -> str:
    """A prompt-set file with the new sentences at their level, to be read by somebody and then given to --prompt-set.

    Args:
        target: The set they belong to.
        level: Their level, or sub-type ("P3/glioma").
        sentences: What was written.
        origin: Who wrote them, for the comment at the head.
    """
    kind, _, sub = level.partition("/")
    if kind not in LEVELS:
        raise ValueError(f"prompts: level must be one of {', '.join(LEVELS)}, got {level!r}.")
    stored: dict[str, Any] = {"title": target.title, "absent": target.absent, "words": list(target.words), "components": target.components,
                              kind: {sub: sentences} if sub else sentences}
    stored = {key: value for key, value in stored.items() if value}
    parse_prompt_set(target.name, stored)
    said = " ".join(origin.split())
    return f"# Written by {said}; nobody has checked it. Read it, and strike what is wrong.\n" + yaml.safe_dump(stored, sort_keys=False, allow_unicode=True, width=170)
