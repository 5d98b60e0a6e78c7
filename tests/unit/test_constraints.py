"""Tokens that a request bans, forces or allows; the state of a grammar follows the answer and nothing else."""

import json
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from raymoe.config import EMBEDDED_MODEL
from raymoe.engine.grammar import MOST_GRAMMAR_CHARS, Grammars
from raymoe.engine.lark import json_grammar
from raymoe.engine.prompts import Prompts, takes_tools
from raymoe.engine.request import Chat, SamplingParams
from raymoe.engine.sampling import Sampler, SamplingDefaults
from raymoe.errors import NotFiniteError, RequestError
from raymoe.serve.tools import call_grammar

VOCABULARY = 4096
END = 0
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@cache
def defaults() -> SamplingDefaults:
    return SamplingDefaults(temperature=0.0, grammars=Grammars(tokenizer(), VOCABULARY, frozenset({END})))


def sampler(**params: Any) -> Sampler:
    return Sampler(SamplingParams(**params), defaults())


def logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))


def answer_of(chooser: Sampler, seed: int, most: int = 400) -> list[int]:
    """Tokens until the end, of a model that has an opinion for each place and no sense."""
    answer: list[int] = []
    while len(answer) < most and END not in answer:
        answer.append(chooser.choose(logits(seed * 1000 + len(answer)), [5], answer)[0])
    return answer


def text_of(answer: list[int]) -> str:
    assert answer[-1] == END
    return tokenizer().decode(answer[:-1])


# --- biases ---------------------------------------------------------------------------------------------


def test_a_bias_bans_and_forces() -> None:
    row = torch.tensor([0.0, 5.0, 1.0])
    plain = Sampler(SamplingParams(logit_bias={}), SamplingDefaults(temperature=0.0))
    banned = Sampler(SamplingParams(logit_bias={1: -100}), SamplingDefaults(temperature=0.0))
    forced = Sampler(SamplingParams(logit_bias={0: 100, 2: 50.5}, temperature=2.0), SamplingDefaults())
    assert [one.choose(row, [1], [])[0] for one in (plain, banned, forced)] == [1, 2, 0]
    assert row.tolist() == [0.0, 5.0, 1.0]


def test_log_probabilities_are_told_without_biases_and_grammar() -> None:
    _, plain = sampler(logprobs=2).choose(logits(1), [5], [])
    token, biased = sampler(logprobs=2, logit_bias={7: 100}).choose(logits(1), [5], [])
    _, by_grammar = sampler(logprobs=2, grammar='start: "a"').choose(logits(1), [5], [])
    assert plain is not None and biased is not None and by_grammar is not None
    assert token == 7
    assert plain.top == biased.top == by_grammar.top
    assert biased.logprob == pytest.approx(torch.log_softmax(logits(1), 0)[7].item())


def test_a_token_that_the_model_never_gives_has_a_finite_log_probability() -> None:
    row = torch.tensor([0.0, -torch.inf])
    forced = Sampler(SamplingParams(logit_bias={0: -100}, logprobs=2), SamplingDefaults(temperature=0.0))
    _, told = forced.choose(row, [0], [])
    assert told is not None
    assert told.top == ((0, 0.0), (1, -9999.0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_hides_no_output_that_is_no_number(temperature: float) -> None:
    spoiled = torch.full((VOCABULARY,), torch.nan)
    for params in ({"grammar": 'start: "a"'}, {"json_schema": PERSON}, {"logit_bias": {5: 100}}):
        with pytest.raises(NotFiniteError):
            sampler(temperature=temperature, **params).choose(spoiled, [5], [])


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        ({4096: 1}, "vocabulary is 0 to 4095"),
        ({5: 100.5}, "-100 to 100"),
        ({5: float("nan")}, "-100 to 100"),
        ({-1: 1}, "no token id"),
        ({"5": 1}, "no token id"),
        (dict.fromkeys(range(1025), 1), "names 1025 tokens, allowed are 1024"),
    ],
)
def test_wrong_biases_are_told(bias: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        sampler(logit_bias=bias)
    assert caught.value.param == "logit_bias"


# --- grammars -------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.0, 1.0]))
def test_whatever_the_model_wants_the_answer_follows_the_schema(seed: int, temperature: float) -> None:
    chooser = sampler(json_schema=PERSON, temperature=temperature, seed=seed)
    jsonschema.validate(json.loads(text_of(answer_of(chooser, seed))), PERSON)


def test_a_finished_grammar_allows_the_end_only() -> None:
    answer = answer_of(sampler(grammar='start: "yes" | "no"'), 3)
    assert text_of(answer) in ("yes", "no")


def test_a_choice_of_its_own_needs_no_history_of_choices() -> None:
    """As after a lost cache, or where several positions of drafts are chosen one after the other."""
    whole = answer_of(sampler(json_schema=PERSON), 11)
    for place in range(len(whole)):
        token, _ = sampler(json_schema=PERSON).choose(logits(11_000 + place), [5], whole[:place])
        assert token == whole[place]


def test_answers_beside_each_other_have_states_of_their_own() -> None:
    alone = [answer_of(sampler(json_schema=PERSON), seed) for seed in (1, 2)]
    choosers, answers = [sampler(json_schema=PERSON) for _ in range(2)], [[], []]  # type: ignore[var-annotated]
    for place in range(max(map(len, alone))):
        for number, chooser in enumerate(choosers):
            if END not in answers[number]:
                row = logits((number + 1) * 1000 + place)
                answers[number].append(chooser.choose(row, [5], answers[number])[0])
    assert answers == alone


def test_json_may_be_indented_but_not_without_end() -> None:
    def takes(text: str) -> bool:
        state = Grammars(tokenizer(), VOCABULARY, frozenset({END})).begin(json_grammar(PERSON))
        return state._matcher.consume_tokens(tokenizer().encode(text)) and state._matcher.is_accepting()

    assert takes('{"name": "a", "age": 3}')
    assert takes('{"name":"a","age":3}')
    assert takes('{\n    "name": "a",\n    "age": 3\n}')
    assert not takes('{"name": "a", "age": 3' + " " * 40 + "}")


@pytest.mark.parametrize(
    ("params", "words", "param"),
    [
        ({"grammar": "start: nothing"}, "unknown name", "grammar"),
        ({"json_schema": {"type": "nothing"}}, "Invalid type: nothing", "grammar"),
        ({"json_schema": {"$ref": "http://127.0.0.1:1/x"}}, "does not fetch", "grammar"),
        ({"json_schema": {"$ref": "#/$defs/x", "$defs": {"x": {"$ref": "#/$defs/x"}}}}, "can't", "grammar"),
        ({"json_schema": "string"}, "a mapping, true or false", "json_schema"),
        ({"json_schema": {}, "grammar": 'start: "a"'}, "not both", "grammar"),
        ({"json_schema": {}, "ignore_eos": True}, "has an end", "ignore_eos"),
        ({"grammar": "x" * (MOST_GRAMMAR_CHARS + 1)}, "allowed are 100,000", "grammar"),
    ],
)
def test_wrong_grammars_are_told(params: dict[str, Any], words: str, param: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        sampler(**params)
    assert caught.value.param == param


def test_a_grammar_that_grows_too_large_ends_its_answer_with_an_error() -> None:
    chooser = sampler(grammar='start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"')
    with pytest.raises(RequestError, match=r"can't go on.*Too many items") as caught:
        answer_of(chooser, 1)
    assert caught.value.param == "grammar"


def test_models_without_tokenizer_or_end_follow_no_grammar() -> None:
    for grammars, words in [
        (Grammars(None, VOCABULARY, frozenset({END})), "no tokenizer"),
        (Grammars(tokenizer(), VOCABULARY, frozenset()), "no end-of-sequence token"),
    ]:
        with pytest.raises(RequestError, match=words):
            Sampler(SamplingParams(grammar='start: "a"'), SamplingDefaults(grammars=grammars))


# --- calls of tools -------------------------------------------------------------------------------------

TOOLS = [
    {"function": {"name": "greet", "parameters": {"$ref": "#/$defs/who", "$defs": {"who": PERSON}}}},
    {"function": {"name": "stop"}},
]


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_that_must_call_calls(seed: int) -> None:
    grammar = call_grammar([TOOLS[0]], parallel=False)
    text = text_of(answer_of(sampler(grammar=grammar), seed))
    call = json.loads(text.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
    assert call["name"] == "greet"
    jsonschema.validate(call["arguments"], PERSON)


def test_several_calls_are_allowed_where_they_may_be_parallel() -> None:
    call = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'

    def takes(parallel: bool, text: str) -> bool:
        state = defaults().grammars.begin(call_grammar(TOOLS, parallel=parallel))  # type: ignore[union-attr]
        return state._matcher.consume_tokens(tokenizer().encode(text)) and state._matcher.is_accepting()

    assert takes(True, call) and takes(False, call)
    assert takes(True, "\n".join([call] * 8)) and not takes(True, "\n".join([call] * 9))
    assert not takes(False, f"{call}\n{call}")
    assert not takes(True, "so: " + call)


# --- prompts --------------------------------------------------------------------------------------------


def prompts(template: str | None) -> Prompts:
    own = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    own.chat_template = template
    return Prompts(own, EMBEDDED_MODEL)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", None),
        (None, None),
        ("{% if tools %}write <tool_call>JSON</tool_call>{{ tools }}{% endif %}", "hermes"),
        ("{% if tools %}write <tool_call><function=f>{{ tools }}{% endif %}", "unknown"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "unknown"),
        ("these are no tools {{ messages }}", None),
        ("{% generation %}{{ tools }}{% endgeneration %}", "unknown"),
    ],
)
def test_how_a_model_calls_tools_is_read_from_its_template(template: str | None, expected: str | None) -> None:
    assert prompts(template).tool_format == expected


def test_loops_that_leave_early_are_understood() -> None:
    assert takes_tools("{% for m in messages %}{% break %}{% endfor %}{{ tools }}")


def test_templates_get_tools_and_arguments_as_objects() -> None:
    template = (
        "{{ tools | length }}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}"
        "{% endfor %}{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 41}'}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    encoded = prompts(template).encode(Chat(messages=messages, tools=TOOLS))
    assert tokenizer().decode(encoded) == "241"
    broken = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
    with pytest.raises(RequestError, match="tool call needs"):
        prompts(template).encode(broken)


def test_tokens_have_texts_or_are_refused() -> None:
    both = prompts(None)
    assert both.decode(both.encode("naïve 漢字")) == "naïve 漢字"
    for bad in (-1, 4096):
        with pytest.raises(RequestError, match=f"token id {bad} is outside"):
            both.decode([5, bad])
