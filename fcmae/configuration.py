"""From the command line to typed options: Hydra composes conf/, this makes dataclasses of it, or one clear line.

Hydra's DictConfig stops here. Unknown keys, also `+added` ones, and wrong types are answered with the key, its value
and what is allowed, and exit code 2; a traceback only with run.debug=true.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import shlex
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fcmae.errors import ConfigError, UserError

RECIPE = "recipe"
Schema = TypeVar("Schema")


def override(key: str, value: str) -> str:
    """`key=value` as typed into a shell, quoted for it and for Hydra where the value needs that."""
    if re.fullmatch(r"[A-Za-z0-9_./:+-]+", value):
        return f"{key}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return shlex.quote(f'{key}="{escaped}"')


def conf_dir() -> str:
    """The folder of configuration files: inside the installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "conf"
    return str(packaged if packaged.is_dir() else Path(__file__).parents[1] / "conf")


def launch(hydra_main: Callable[[], Any], schema: type) -> None:
    """Run a `@hydra.main` function, turning what users get wrong into one line on stderr and exit code 2.

    The schema's own defaults become the configuration `defaults`, the base that the files in conf/ build on.
    """
    ConfigStore.instance().store("defaults", OmegaConf.create(dataclasses.asdict(schema())))
    logging.getLogger("hydra").addHandler(logging.NullHandler())  # it would announce errors that are reported here
    # Hydra would print its own multi-line report and exit with 1; this makes it raise instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        check_overrides(sys.argv[1:], schema)
        hydra_main()
    except (UserError, HydraException, OmegaConfBaseException, YAMLError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def run(composed: DictConfig, schema: type[Schema], body: Callable[[Schema], None]) -> None:
    """Type and validate what Hydra composed and run `body` on it; the inside of a `@hydra.main` function."""
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN and "run" in composed and "run.dir" in leaf_keys(schema):
            # Jobs of a sweep must not continue each other.
            composed.run.dir = f"{composed.run.dir}/{HydraConfig.get().job.num}"
        check_effect(composed, list(HydraConfig.get().overrides.task))
        config = to_dataclass(composed, schema)
        config.validate()  # type: ignore[attr-defined]
        body(config)
    except (UserError, OmegaConfBaseException) as error:
        fail(error)  # here, since Hydra would add a line of its own to an error that passes through it
    except RuntimeError as error:
        # torch's handler raises this wherever the main process happens to be.
        if "DataLoader worker" not in str(error):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # said once is enough
        said = str(error).strip(" .")
        fail(UserError(f"{said}. Something outside ended it, often for lack of memory; try a smaller data.workers"))


def fail(error: BaseException) -> NoReturn:
    """Report an error as one line, after its traceback if run.debug=true was given, and exit with code 2."""
    if any(argument.lstrip("+").lower() in ("run.debug=true", "debug=true") for argument in sys.argv[1:]):
        traceback.print_exc()
    print(f"error: {describe(error)}", file=sys.stderr)
    sys.exit(2)


def describe(error: BaseException) -> str:
    """An error of Hydra or OmegaConf as one line, without their advice about their own syntax."""
    if isinstance(error, UserError):
        return str(error)
    text = str(error).split("Config search path:")[0].split("See https://")[0]
    if isinstance(error, OverrideParseException):
        reason = text.splitlines()[0].strip() or "special characters"
        return f"{error.override}: cannot be read as key=value ({reason}); quote special characters: 'key=\"value\"'"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith(("full_key", "object_type", "reference_type")))


def check_overrides(arguments: list[str], schema: type) -> None:
    """Raise ConfigError for an override whose key the schema does not have; values are checked after composition."""
    words = [a for a in arguments if not a.startswith("-") and "=" in a]
    groups = {child.name for folder in config_folders(arguments) for child in folder.iterdir() if child.is_dir()}
    known = set(leaf_keys(schema))
    for override in OverridesParser.create().parse_overrides(words):
        key = override.key_or_group
        if key in groups and not isinstance(override.value(), str):
            raise ConfigError(
                key, str(override.input_line).split("=", 1)[1], "must be the name of a file in conf/" + key
            )
        if key == RECIPE and not override.is_delete() and "$" not in override.value():
            _check_recipe(override.value(), arguments)
        if "/" in key or key in groups or key.split(".")[0] == "hydra" or override.is_delete():
            continue
        if key not in known and not any(name.startswith(key + ".") for name in known):
            value = str(override.input_line).split("=", 1)[1]
            raise unknown_key(key, value, known | groups)


def _check_recipe(name: str, arguments: list[str]) -> None:
    """Raise ConfigError for one that is not there, which Hydra would pass over, since experiments need not have one."""
    files = {file.stem for folder in config_folders(arguments) for file in (folder / RECIPE).glob("*.yaml")}
    if name.removesuffix(".yaml") not in files:
        raise ConfigError(RECIPE, name, f"must be one of {', '.join(sorted(files))}")


def check_effect(composed: DictConfig, given: list[str]) -> None:
    """Raise ConfigError for an override that another setting makes meaningless."""
    lr = OmegaConf.select(composed, "optim.lr")
    for override in given:
        key, _, value = override.lstrip("+").partition("=")
        if key == "optim.base_lr" and lr is not None:
            raise ConfigError(key, value, f"has no effect while optim.lr={lr}; add optim.lr=null")


def config_folders(arguments: list[str]) -> list[Path]:
    """conf/ and the folder given with --config-dir."""
    folders = [Path(conf_dir())]
    for position, argument in enumerate(arguments):
        if argument.startswith("--config-dir="):
            folders.append(Path(argument.split("=", 1)[1]))
        elif argument in ("--config-dir", "-cd") and position + 1 < len(arguments):
            folders.append(Path(arguments[position + 1]))
    return [folder for folder in folders if folder.is_dir()]


def unknown_key(key: str, value: object, known: set[str]) -> ConfigError:
    section = sorted(k for k in known if "." in k and k.split(".")[0] == key.split(".")[0])
    close = _closest(key, section) or _closest(key, sorted(known))
    if close:
        advice = f"did you mean {close}?"
    elif section:
        advice = f"{key.split('.')[0]} takes {', '.join(k.split('.', 1)[1] for k in section)}"
    else:
        advice = f"settings start with {', '.join(sorted({k.split('.')[0] for k in known}))}"
    return ConfigError(key, value, f"no such setting; {advice}")


def _closest(key: str, names: list[str]) -> str | None:
    """The name whose last part is most like that of `key`, if any is: optim.lr for optim.lrr and for lr."""
    last_parts = {name.split(".")[-1]: name for name in reversed(names)}
    found = difflib.get_close_matches(key.split(".")[-1], last_parts, n=1, cutoff=0.65)
    return last_parts[found[0]] if found else None


def leaf_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a dataclass and those within it."""
    hints = typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        hint = hints[entry.name]
        if dataclasses.is_dataclass(hint):
            yield from leaf_keys(typing.cast(type, hint), f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


def to_dataclass(config: DictConfig | dict, schema: type[Schema]) -> Schema:
    """A composed configuration as `schema`; raises ConfigError for unknown keys and wrong types.

    Merged onto a fresh schema, since keys added with `+` pass Hydra's own check.
    """
    plain = OmegaConf.create(OmegaConf.to_container(OmegaConf.create(config), resolve=True))
    known = set(leaf_keys(schema))
    for key, value in flatten(plain):
        if key not in known and not any(key.startswith(f"{name}.") for name in known):
            raise unknown_key(key, value, known)
    try:
        return typing.cast(Schema, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain)))
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        value = OmegaConf.select(plain, key) if error.full_key else None
        raise ConfigError(key, value, f"must be {expected_type(schema, key)}") from error


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; lists are values."""
    for key, value in config.items():
        if isinstance(value, dict | DictConfig) and len(value):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def expected_type(schema: type, key: str) -> str:
    """What the annotation of a dotted key asks for, in words."""
    kind: Any = schema
    for part in key.split("[")[0].split("."):
        kind = typing.get_type_hints(kind)[part]
    options = [a for a in typing.get_args(kind) if a is not type(None)] if _is_union(kind) else [kind]
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", list[int]: "a list of integers"}
    names[list[float]] = "a list of numbers"
    words = " or ".join(names.get(option, getattr(option, "__name__", str(option))) for option in options)
    return words + (" or null" if _is_union(kind) and type(None) in typing.get_args(kind) else "")


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)
