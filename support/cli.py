"""Command lines: a script declares one dataclass, and `parse_args` turns it into flags.

The dataclass is the only list of settings, so `--help`, the defaults and the checks cannot drift apart. Imports nothing but the
standard library, so that `--help` answers at once.
"""

import argparse
import dataclasses
import math
import sys
import types
import typing
from pathlib import Path

from support.errors import UserError, _one_line


def flag(default, help, /, **metadata):
    """A field of a script's dataclass: `lr: float = flag(1e-3, "learning rate", min=0)`. `parse_args` lists the metadata.

    A list as default is copied for each instance.
    """
    metadata = {"help": help, **metadata}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        # argparse would print the whole usage first; one line that names the flag is easier to act on.
        print(f"error: {_one_line(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _number(kind, low, high):
    """Reader for an int or float flag within [low, high]; either bound may be None. NaN and infinity are refused."""

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole' if kind is int else 'a'} number"
            ) from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"{text} is too small; the least is {low}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"{text} is too large; the most is {high}")
        return value

    return read


def _number_list(kind, low, high):
    item = _number(kind, low, high)

    def read(text):
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a comma-separated list such as {'a,b' if kind is str else '0,1'}"
            )
        return [item(part) for part in parts]

    return read


def _add_flags(parser, args_class):
    hints = typing.get_type_hints(args_class)
    for field in dataclasses.fields(args_class):
        kind, meta = hints[field.name], field.metadata
        if typing.get_origin(kind) in (typing.Union, types.UnionType):  # Optional[X] and X | None read like X
            (kind,) = [k for k in typing.get_args(kind) if k is not type(None)]
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        else:
            default = field.default
        required = default is dataclasses.MISSING
        if required:
            shown = "required"
        elif "default" in meta:  # what a None stands for, e.g. "5e-6 for 7B, 1e-4 for tiny"
            shown = f"default: {meta['default']}"
        elif isinstance(default, bool):
            shown = f"default: {'on' if default else 'off'}"
        elif isinstance(default, (list, tuple)):
            shown = f"default: {','.join(map(str, default))}"
        else:
            shown = f"default: {'none' if default is None else default}"
        options = {
            "dest": field.name,
            "default": None if required else default,
            "required": required,
            "help": f"{meta['help']} ({shown})".replace("%", "%%"),  # argparse would format a lone %
        }
        low, high = meta.get("min"), meta.get("max")
        choices = meta.get("choices")
        if typing.get_origin(kind) is typing.Literal:
            choices, kind = typing.get_args(kind), str
        if choices is not None:
            options["choices"] = tuple(choices)
            options["metavar"] = "{" + ",".join(map(str, choices)) + "}"
        if kind is bool:
            options.pop("choices", None)
            options["action"] = argparse.BooleanOptionalAction
        elif kind in (int, float):
            options["type"] = _number(kind, low, high)
            options.setdefault("metavar", "N" if kind is int else "X")
        elif typing.get_origin(kind) in (list, tuple):
            item = typing.get_args(kind)[0]
            options["type"] = _number_list(item, low, high)
            dots = "…" if "utf" in (sys.stdout.encoding or "").lower() else ".."
            options["metavar"] = ("A,B," if item is str else "N,N,") + dots
        else:
            options["type"] = kind  # str or Path
            options.setdefault("metavar", "PATH" if kind is Path else "TEXT")
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def _build(args_class, namespace):
    try:
        return args_class(
            **{field.name: getattr(namespace, field.name) for field in dataclasses.fields(args_class)}
        )
    except ValueError as exc:  # a __post_init__ that refuses a combination of flags
        raise UserError(str(exc)) from None


def parse_args(args_class, description, argv=None):
    """Command line of a script from its dataclass of arguments.

    Every field becomes one `--kebab-case` flag. Supported types: int, float, str, Path, bool (`--flag` / `--no-flag`),
    `X | None`, lists of int, float or str (comma-separated: `--task-ids 0,1`), `Literal["a", "b"]`.
    Metadata of a field: "help" (required), "choices", "min" and "max" (numbers, or each number of a list), "default"
    (text that `--help` shows instead of the value, for a None that is resolved later).

    Returns an instance of `args_class`. Wrong input prints one line on stderr and exits with 2.
    """
    parser = _Parser(description=description, allow_abbrev=False)
    _add_flags(parser, args_class)
    return _build(args_class, parser.parse_args(argv))


def parse_command(commands, description, argv=None):
    """Like `parse_args` for a script with sub-commands (`python -m scripts.rprm label --limit 2`).

    commands: {name: (args_class, help)}. Returns (name, instance of that command's dataclass).
    """
    parser = _Parser(description=description, allow_abbrev=False)
    sub = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(commands) + "}")
    for name, (args_class, help_text) in commands.items():
        text = help_text.replace("%", "%%")
        _add_flags(sub.add_parser(name, help=text, description=text, allow_abbrev=False), args_class)
    namespace = parser.parse_args(argv)
    return namespace.command, _build(commands[namespace.command][0], namespace)


def parse_settings(args_class, settings, where, renamed=()):
    """Instance of `args_class` from a JSON object that an earlier run wrote, each value checked as its flag would be.

    A setting that is absent (the file is older than the flag) takes its default. One that exists no more is left out with a
    warning. renamed: pairs (old name, new name). Raises UserError naming `where`.
    """

    class Parser(_Parser):
        def error(self, message):
            raise UserError(f"{where}: {_one_line(message)}")

    hints = typing.get_type_hints(args_class)
    parser, argv, nulls = Parser(allow_abbrev=False), [], []
    _add_flags(parser, args_class)
    if not isinstance(settings, dict):
        raise UserError(f"{where}: no JSON object with settings")
    for name, value in settings.items():
        name = dict(renamed).get(name, name)
        if name not in hints:
            print(
                f"warning: {_one_line(where)}: there is no setting {name!r} any more; left out",
                file=sys.stderr,
            )
        elif value is None:
            if type(None) not in typing.get_args(hints[name]):
                raise UserError(f"{where}: setting {name!r} = None is not possible")
            nulls.append(name)
        elif isinstance(value, bool):
            argv.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        else:
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            argv.append(f"--{name.replace('_', '-')}={text}")
    args = _build(args_class, parser.parse_args(argv))
    for name in nulls:
        setattr(args, name, None)
    return args
