"""A job file as a YAML document: its data with the line of every key, and its validation errors with these lines.

Duplicate keys, aliases and custom tags are errors.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from enrich.errors import UNREADABLE_HINT, JobError, closest_name, did_you_mean, suggest_name
from enrich.job.local_files import read_text
from enrich.job.locations import as_argument
from enrich.job.spec import JobModel, SteppedJobModel
from enrich.job.target import SOURCES_KEY, Param, Source, TargetModel
from enrich.models import PLAIN_NUMBER

_NUMBER_TAGS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
#: A number has at most this many characters. Python refuses one that is longer still.
_MAX_NUMBER_LENGTH = 1_000
_OCTAL_NUMBER = re.compile(r"-?0[0-9]+")
#: Messages of PyYAML about an element that has begun earlier.
_KEY_NOT_ENDED = "could not find expected ':'"
_NOT_ENDED = (_KEY_NOT_ENDED, "found unexpected end of stream", "found unexpected document separator")
#: NUL and lone surrogates: YAML can write them as escapes only, and no output can contain them.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class YamlDocument:
    """A YAML file as plain data, with the line of every key."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises JobError that names the file and, if possible, the line."""
        self.path = path
        #: Keys whose values the command line replaces. Messages name their options.
        self.replaced_keys: frozenset[str] = frozenset()
        try:
            text = read_text(path)
        except FileNotFoundError:
            raise JobError(f"{path}: the job file does not exist", "create one: enrich init CSV") from None
        except OSError as error:
            raise JobError(f"{path}: the job file cannot be read: {error.strerror}", UNREADABLE_HINT) from error
        except UnicodeDecodeError as error:
            raise JobError(
                f"{path}: the job file is not UTF-8 text", _not_yaml_hint(path) or "save it as UTF-8"
            ) from error
        try:
            root = _Loader(text).get_single_node()
        except yaml.MarkedYAMLError as error:
            problem, begin = error.problem or error.context or "", error.context_mark
            # A key or a quoted text that does not end is noticed later. It is to be corrected where it begins.
            mark = begin if begin and problem.startswith(_NOT_ENDED) else error.problem_mark or begin
            line = f":{mark.line + 1}" if mark else ""
            hint = _not_yaml_hint(path) or _syntax_hint(problem, 1 if begin is None else begin.line + 1)
            # Drop the cause: it quotes the file's content.
            raise JobError(f"{path}{line}: {problem}", hint) from None
        except yaml.YAMLError as error:
            raise JobError(f"{path}: not YAML: {' '.join(str(error).split())}", _not_yaml_hint(path)) from None
        except RecursionError:
            raise JobError(f"{path}: nested too deeply") from None
        if not isinstance(root, yaml.MappingNode):
            raise JobError(
                f"{path}: a job file must be a mapping of keys",
                _not_yaml_hint(path) or "create one: enrich init CSV",
            )
        #: The folder to which the paths in the file are relative.
        self.folder = path.resolve().parent
        self._root = root
        self.data: dict[Any, Any] = _to_plain_data(root, path)

    def line_of(self, key_path: Sequence[str | int]) -> int:
        """Return the line (from 1) of the key at a path of keys and list indexes, or of its last existing key."""
        node: yaml.Node = self._root
        line = 0
        for key in key_path:
            if isinstance(node, yaml.MappingNode):
                pair = next((pair for pair in node.value if str(pair[0].value) == str(key)), None)
                if pair is None:
                    break
                line, node = pair[0].start_mark.line, pair[1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
                node = node.value[key]
                line = node.start_mark.line
            else:
                break
        return line + 1

    def place_of(self, key_path: Sequence[str | int]) -> str:
        """Return the file, the line and the key at a path, as messages name them, or the option in place of the key."""
        if key_path[0] in self.replaced_keys:
            return f"--{key_path[0]}"
        return f"{self.path}:{self.line_of(key_path)}: {'.'.join(map(str, key_path))}"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with aliases as errors."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, f"YAML aliases (*{event.anchor}) are not allowed: write the value out", event.start_mark
            )
        return super().compose_node(parent, index)


def _syntax_hint(problem: str, first_line: int) -> str | None:
    """Return what to do about an error of YAML, in an element that begins at `first_line`."""
    if problem.startswith(_NOT_ENDED):
        return "put a colon and a blank after the key" if problem == _KEY_NOT_ENDED else "close the quote"
    if problem.startswith(("expected ',' or", "expected ':'")):
        return f"close the bracket of line {first_line}, and put commas between its items"
    if "escape" in problem:
        return "put it in single quotes, where \\ is no escape"
    if "expected a comment or a line break" in problem or problem.endswith("but found '<scalar>'"):
        return "put the whole value in single quotes, and double those inside it"
    if "\\t" in problem:
        return "indent with blanks"
    if "cannot start any token" in problem or "expected alphabetic or numeric character" in problem:
        return "put it in quotes if it is text"
    if "<block end>" in problem or "mapping values are not allowed" in problem:
        return "check the indentation: keys of one level begin in the same column"
    return None


def _not_yaml_hint(path: Path) -> str | None:
    """Return a hint on creating a job if the file is not a YAML file but, for example, the leads. Else None."""
    if path.suffix in (".yaml", ".yml"):
        return None
    if path.suffix == ".db":
        return "JOB must be the job file, not its ledger"
    return f"JOB must be a YAML file. To create one: {shlex.join(['enrich', 'init', as_argument(path)])}"


def _to_plain_data(node: yaml.Node, path: Path) -> Any:  # noqa: ANN401 - YAML
    """Convert a YAML node to plain data. Keys are always text, as written (`NO:` is not a boolean)."""
    if isinstance(node, yaml.MappingNode):
        data: dict[str, Any] = {}
        for key, value in node.value:
            where = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise JobError(f"{where}: a key must be text", "put a text with { or [ in quotes")
            name = _checked_text(key, where)
            if name in data:
                raise JobError(f"{where}: `{name}` is set twice", "remove one of the two")
            data[name] = _to_plain_data(value, path)
        return data
    if isinstance(node, yaml.SequenceNode):
        return [_to_plain_data(item, path) for item in node.value]
    where = f"{path}:{node.start_mark.line + 1}"
    text = _checked_text(node, where)
    if node.tag in _NUMBER_TAGS and len(text) > _MAX_NUMBER_LENGTH:
        raise JobError(f"{where}: a number of {len(text):,} characters", "put it in quotes if it is text")
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        invalid = f"`{text}` is not a valid {node.tag.rpartition(':')[2]}"
        problem = error.problem if isinstance(error, yaml.MarkedYAMLError) else invalid
        raise JobError(f"{where}: {problem}", "put it in quotes if it is text") from None
    if node.tag in _NUMBER_TAGS and (_OCTAL_NUMBER.fullmatch(text) or not PLAIN_NUMBER.fullmatch(text)):
        hint = "write numbers in plain digits, such as 1000 or 0.5, and put text in quotes"
        raise JobError(f"{where}: YAML reads `{text}` as {value}", hint)
    return value


def _checked_text(node: yaml.Node, where: str) -> str:
    """Return the text of a scalar. Raises JobError for characters that are no text."""
    text = str(node.value)
    if found := _NO_TEXT.search(text):
        problem = "a NUL character" if found[0] == "\0" else f"half a character (\\u{ord(found[0]):04x})"
        raise JobError(f"{where}: has {problem}", "remove the escape, or write the character itself")
    return text


#: Messages for pydantic's error types, in terms of the job file. In braces are the limits that pydantic gives.
_ERROR_MESSAGES = {
    "missing": "is missing",
    "model_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "list_type": "must be a list: [...]",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
}
_MISSING_HINTS = {
    "version": "begin the file with `version: 1`",
    "waterfall": "set a `waterfall` or an `enrichment`",
}
#: What the patterns of the names of jobs and steps allow.
_ALLOWED_NAMES = {
    "job": "must have only letters, digits and . _ -, and begin with a letter or digit",
    "step": "must have only lowercase letters, digits and _, and begin with a letter",
}


def validate_document(document: YamlDocument) -> JobModel:
    """Check the keys and values of a job file. Raises JobError with all problems, each with its line."""
    if "api_key" in document.data:
        raise JobError(
            f"{document.place_of(['api_key'])}: the API key does not belong in the job file",
            "set DATABAR_API_KEY, or DATABAR_API_KEY_FILE for cron",
        )
    model_type = SteppedJobModel if "steps" in document.data else JobModel
    try:
        return model_type.model_validate(document.data)
    except ValidationError as error:
        raise _join_errors(document, error) from error


def _join_errors(document: YamlDocument, error: ValidationError) -> JobError:
    """Combine all validation errors, sorted by line. A single error has its hint as a separate text."""
    found: list[tuple[int, str, str | None]] = []
    #: The place and the hint of each misspelled key. The right key is not reported as missing, too.
    misspelled: list[tuple[list[str | int], str | None]] = []
    problems = error.errors(include_url=False)
    for problem in sorted(problems, key=lambda each: each["type"] != "extra_forbidden"):
        key_path = [step for step in problem["loc"] if step not in ("[key]", SOURCES_KEY)]
        if problem["type"] == "default_factory_not_called":
            continue  # the field it depends on has its own error
        message = problem["msg"].removeprefix("Value error, ")
        if (template := _ERROR_MESSAGES.get(problem["type"])) is not None:
            message = template.format_map(problem.get("ctx", {}))
        hint = _MISSING_HINTS.get(str(key_path[-1])) if message == "is missing" else None
        if problem["type"] == "literal_error" and isinstance(problem["input"], str):
            closest = closest_name(problem["input"], re.findall("'([^']+)'", message))
            hint = None if closest is None else did_you_mean(closest)
        if problem["type"] == "string_pattern_mismatch" and key_path[-1:] == ["name"]:
            message = _ALLOWED_NAMES["step" if _is_step(key_path[:-1]) else "job"]
        if key_path in (["input"], ["output"]) and isinstance(problem["input"], list):
            message = "must be one path, not a list"
            hint = "for several files: a folder, or a pattern such as leads/*.csv" if key_path == ["input"] else None
        if problem["type"] == "extra_forbidden":
            message, hint = "unknown key", _key_hint(key_path, is_stepped="steps" in document.data)
            misspelled.append((key_path[:-1], hint))
        elif message == "is missing" and (key_path[:-1], did_you_mean(str(key_path[-1]))) in misspelled:
            continue
        found.append((document.line_of(key_path), f"{document.place_of(key_path)}: {message}", hint))
    found.sort(key=lambda each: each[0])
    if len(found) == 1:
        _, text, hint = found[0]
        return JobError(text, hint)
    return JobError("\n".join(f"{text}, {hint}" if hint else text for _, text, hint in found))


def _key_hint(key_path: Sequence[str | int], *, is_stepped: bool) -> str | None:
    """Return a hint for an unknown key: the level it belongs to, or the nearest valid key."""
    key, at_step = str(key_path[-1]), _is_step(key_path[:-1])
    if at_step and key in JobModel.model_fields:
        return f"`{key}` is a key of the job, for all steps together"
    if len(key_path) == 1 and key == "complete":
        return "`complete` is for a job with `steps`"
    places = list(_places_below(key, JobModel)) if len(key_path) == 1 else []
    if len(places) == 1:
        return f"it is a key of `{places[0]}`"
    return suggest_name(key, _sibling_keys(key_path, is_stepped=is_stepped))


def _places_below(key: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield the keys of a model whose own keys, at any depth, include this key."""
    for name, field in model.model_fields.items():
        if (inner := _model_in(field.annotation)) is not None:
            if key in inner.model_fields:
                yield name
            yield from (f"{name}.{place}" for place in _places_below(key, inner))


def _is_step(key_path: Sequence[str | int]) -> bool:
    """Return whether this is the place of a step."""
    return len(key_path) == len(("steps", 0)) and key_path[0] == "steps"


def _sibling_keys(key_path: Sequence[str | int], *, is_stepped: bool) -> list[str]:
    """List the valid keys at the place of an unknown key."""
    model: type[BaseModel] = SteppedJobModel if is_stepped else JobModel
    for key in key_path[:-1]:
        if model is Param and isinstance(key, int):
            model = Source
        elif (field := model.model_fields.get(str(key))) is not None:
            model = _model_in(field.annotation) or model
    names = [field.alias or name for name, field in model.model_fields.items()]
    if model is SteppedJobModel:
        names = [name for name in names if name not in TargetModel.model_fields]
    return [name for name in [*names, *(["steps"] if model is JobModel else [])] if name != SOURCES_KEY]


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Return the model in the type of a key, such as a list of models; None: it has none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def yaml_scalar(text: str) -> str:
    """Format a text as a YAML scalar on one line, quoted if necessary."""
    plain = bool(text) and all(sign.isalnum() or sign in " _-./" for sign in text) and text[0] not in " -/"
    if plain and text.isprintable() and text == text.strip():
        try:
            if yaml.safe_load(f"[{text}]") == [text]:
                return text
        except (yaml.YAMLError, ValueError):
            pass
    return yaml.safe_dump(text, default_style='"', width=inf, allow_unicode=True).removesuffix("\n")


def yaml_mapping(values: Mapping[str, str]) -> str:
    """Format texts with their names as a YAML mapping on one line."""
    return f"{{{', '.join(f'{yaml_scalar(name)}: {yaml_scalar(value)}' for name, value in values.items())}}}"
