"""Text to distil from: prompts by template, continued by the target model itself.

A drafter is only asked about text that the target writes, so that is what it learns from. With
every token are kept the target's `TOP` most likely ones and their logprobs, of one more pass over
the text: training then needs none. Shards are written as they are made, so a run that stops early
has what it made.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvarn.core.errors import ConfigError
from kvarn.core.request import SamplingParams
from kvarn.speculate.train.network import Network, autocast

TOP = 20  #: alternatives kept with each token: as many as a request may ask for

TOPICS = """
volcanoes; the French Revolution; baking bread; black holes; bicycles; honey bees; chess; the
Amazon river; jazz; vaccines; the Roman army; photosynthesis; credit cards; kangaroos; the moon
landing; sailing; earthquakes; coffee; the printing press; solar panels; dinosaurs; the human
heart; tennis; public libraries; glaciers; compound interest; whales; the Silk Road; gravity;
gardening tomatoes; sleep; electric cars; owls; the Great Wall of China; poetry; antibiotics;
trains; coral reefs; yoga; the Second World War; computer networks; chocolate; deserts; the
violin; recycling; Mars; cats; inflation; the Vikings; rainbows; swimming; DNA; lighthouses; the
Olympic Games; mushrooms; bridges; the water cycle; painting; dogs; ancient Egypt; time zones;
robots; tea; the stock market; wolves; magnets; the brain; football; castles; plastic;
thunderstorms; dolphins; steam engines; democracy; prime numbers; the piano; penguins; wind
turbines; Shakespeare; nutrition; satellites; the Sahara; knitting; memory; oceans; budgets;
elephants; telescopes; cheese; friendship; hurricanes; maps; ants; the Renaissance; running a
marathon; batteries; forests; job interviews; pyramids; salt; the internet; butterflies; insulin;
skiing; the Titanic; sound waves; rice; the Industrial Revolution; spiders; airports; sharks; the
Cold War; clouds; pottery; the immune system; subways; bread flour;
Saturn; ballet; carbon dioxide; bamboo; the Vikings' ships; handwriting; a healthy breakfast; the
United Nations; hummingbirds; concrete; the alphabet; karate; parrots; fractions; waterfalls; the
Middle Ages; podcasts; lemons; the stomach; helicopters; the Great Depression; snowflakes; ferns;
violins and cellos; sleepwalking; the Moon; houseplants; credit scores; volleyball; mosquitoes;
theatre; fireworks; the ozone layer; buses; peanut butter; sculptures; tides; basketball; turtles;
the Berlin Wall; mountains; photography; vitamins; rockets; frogs; the Constitution; dreams; soup;
encryption; seeds; marathons for beginners; the Nile; typewriters; bacteria; the opera house in
Sydney; babysitting; statistics; rain; pirates; the human eye; databases; weddings; crows; steel;
the Pacific Ocean; moving to a new city; crosswords; potatoes; laser light; the Inca empire; fear;
a lost wallet; learning a language; Monday mornings; an old house by the sea; small businesses;
teamwork; kindness; the first day of school; a dragon and a baker; museums; the Arctic; tomatoes;
remote work; noise; public speaking; camping; trust; chemistry; email; shoes; the weather; pencils;
algebra; a broken clock; neighbours; water; superheroes; autumn; the speed of light; grandparents;
""".replace("\n", " ")  # fmt: skip

#: never trained on: what acceptance is measured with
HELD_OUT_TOPICS = """
tigers; the Black Death; kites; opera; the periodic table; rivers; apples; submarines; the Aztecs;
origami; lightning; horses; taxes; comets; soap; the guitar; camels; voting; glass; the sun;
""".replace("\n", " ")

QUESTIONS = """
What is the most important thing to know about {}?; Explain {} to a ten-year-old.; Write a short
story about {}.; Give me five facts about {}.; What are the advantages and disadvantages of {}?;
Write a poem about {}.; Summarize the history of {} in one paragraph.; How does science explain
{}?; I need to give a talk on {}. Can you write an outline?; What are common mistakes people make
about {}?; Write an email to a colleague about {}.; Why do people care about {}?; Describe {} in
three sentences.; Make a list of ten words related to {}.; Write a dialogue between two friends
about {}.; What would happen without {}?; Compare {} with something similar.; Write a Python
function that has something to do with {}.; Create a quiz with three questions about {}.; What
books would you recommend about {}?; How did {} change the world?; Tell me a joke about {}.; Write
a product description related to {}.; How can I learn more about {}?; Write a news article about
{}.; Please rewrite this more formally: "{} is really cool and everybody should know it."; Plan a
week of activities around {}.; Which jobs have to do with {}?
""".replace("\n", " ")  # fmt: skip

BEGINNINGS = """
The most surprising thing about {} is; Chapter 1. It all began with {}.; Once upon a time, in a
village where everybody talked about {},; {} is; In this article we will look at {}.; A brief
introduction to {}:; Abstract. We study {} and show that; Q: What is known about {}? A:; Ten
reasons to love {}: 1.; Dear diary, today I learned about {}.; The teacher asked the class about
{}, and; # Notes on {}
""".replace("\n", " ")  # fmt: skip

#: temperature -> share of the sequences; some are greedy, since many requests are
TEMPERATURES = {1.0: 0.55, 0.8: 0.25, 0.0: 0.20}


def items(text: str) -> list[str]:
    """The entries of a list in one string, parted by semicolons."""
    return [item.strip() for item in text.split(";") if item.strip()]


def prompts(held_out: bool, seed: int) -> Iterator[tuple[bool, str]]:
    """Endless (is a chat message, text), in a random order; every pair once before any twice."""
    topics = items(HELD_OUT_TOPICS if held_out else TOPICS)
    forms = [(True, q) for q in items(QUESTIONS)] + [(False, b) for b in items(BEGINNINGS)]
    pairs = [(chat, form, topic) for chat, form in forms for topic in topics]
    rng = Random(seed)
    while True:
        rng.shuffle(pairs)
        for chat, form, topic in pairs:
            text = form.replace("{}", topic)
            yield chat, text[0].upper() + text[1:]


class Generator(Protocol):
    """What writes the text: an engine in this program (`kvarn.engine.llm.LLM`)."""

    tokenizer: Any

    def generate(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[Any]:
        """Completions of each prompt."""
        ...


@dataclass(slots=True)
class Sample:
    """A prompt and what the target wrote after it, n tokens."""

    tokens: Tensor  #: [prompt + n] int64
    prompt: int  #: tokens of the prompt
    top: Tensor  #: [n, TOP] int64: the most likely tokens at each place of the output
    logprobs: Tensor  #: [n, TOP] their logprobs, of the target's own distribution


def generate(
    llm: Generator,
    teacher: Network,
    folder: Path,
    n_shards: int,
    *,
    held_out: bool = False,
    per_shard: int = 256,
    max_tokens: int = 160,
    temperatures: dict[float, float] = TEMPERATURES,
    seed: int = 0,
    go_on: Callable[[int], bool] = lambda tokens: True,
) -> int:
    """Write up to `n_shards` shards of `per_shard` sequences into `folder`; tokens made.

    `teacher` is the target whole, as `from_target` makes it of all of its layers.
    `go_on(tokens so far)` is asked after each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, rng, made = prompts(held_out, seed), Random(seed + 1), 0
    base = SamplingParams(max_tokens=max_tokens)
    for shard in range(n_shards):
        asked, params = list[list[int]](), list[SamplingParams]()
        for i in range(per_shard):
            chat, text = next(source)
            asked.append(_ids(llm.tokenizer, chat, text))
            (heat,) = rng.choices(list(temperatures), list(temperatures.values()))
            params.append(replace(base, temperature=heat, seed=seed + shard * per_shard + i))
        done = llm.generate(asked, params)
        texts = [(one.prompt_tokens, one.outputs[0].tokens) for one in done]
        samples = labelled(teacher, [text for text in texts if text[1]])
        write(folder / f"shard-{shard:04d}.safetensors", samples)
        made += sum(len(sample.top) for sample in samples)
        if not go_on(made):
            break
    return made


def _ids(tokenizer: Any, chat: bool, text: str) -> list[int]:
    if not chat:
        return list(tokenizer.encode(text))
    whole = tokenizer.chat([{"role": "user", "content": text}])
    return list(tokenizer.encode(whole, add_special=False))


@torch.no_grad()
def labelled(
    teacher: Network, texts: Sequence[tuple[list[int], list[int]]], batch: int = 32
) -> list[Sample]:
    """Texts (prompt, what follows), with the teacher's word on every token of what follows."""
    samples, device = list[Sample](), teacher.embed.device
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        tokens = [torch.tensor(prompt + wrote) for prompt, wrote in some]
        with autocast(device):
            states = teacher(pad_sequence(tokens, batch_first=True).to(device))
        for i, (prompt, wrote) in enumerate(some):
            here = states[i, len(prompt) - 1 : len(prompt) - 1 + len(wrote)]
            logits = (here.to(teacher.embed.dtype) @ teacher.embed.T).float()
            best = logits.log_softmax(1).topk(TOP)
            found = best.indices.cpu(), best.values.cpu()
            samples.append(Sample(tokens[i], len(prompt), *found))
    return samples


def common(samples: Sequence[Sample], size: int, vocab: int) -> Tensor:
    """The `size` tokens that the target writes most often, ascending."""
    wrote = torch.cat([sample.tokens[sample.prompt :] for sample in samples])
    return wrote.bincount(minlength=vocab).topk(size).indices.sort().values


def write(path: Path, samples: Sequence[Sample]) -> None:
    """One shard; a file is whole or is not there."""
    kept = [sample for sample in samples if len(sample.top)]
    tensors = {
        "tokens": torch.cat([s.tokens for s in kept]).int(),
        "lengths": torch.tensor([len(s.tokens) for s in kept]),
        "prompts": torch.tensor([s.prompt for s in kept]),
        "top": torch.cat([s.top for s in kept]).int(),
        "logprobs": torch.cat([s.logprobs for s in kept]).half(),
    }
    partial = path.with_suffix(".part")
    save_file(tensors, partial)
    partial.rename(path)


def read(folder: Path) -> list[Sample]:
    """Every sample of a folder's shards; `ConfigError` where there is none."""
    samples = list[Sample]()
    for path in sorted(folder.glob("shard-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            get = file.get_tensor
            lengths, starts = get("lengths").tolist(), get("prompts").tolist()
            tokens = get("tokens").long().split(lengths)
            outputs = [length - start for length, start in zip(lengths, starts)]
            tops = get("top").long().split(outputs)
            logprobs = get("logprobs").float().split(outputs)
        samples += [Sample(*s) for s in zip(tokens, starts, tops, logprobs)]
    if not samples:
        raise ConfigError(f"{folder} holds no shard-*.safetensors: generate a corpus there first")
    return samples
