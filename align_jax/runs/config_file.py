# SPDX-License-Identifier: Apache-2.0
"""The flag ``--config``: a recipe, a file that is run, or YAML that is read, and keys that the
command line changes in it.

    dpo_7b, tiny:dpo            a recipe, and its argument after a colon
    dpo, kto, online_dpo, ...   an objective: the recipe start:dpo, an adapter, your model and data
    my_module:my_objective      likewise
    mine.py, mine.py:argument, mine.yaml
"""

from __future__ import annotations

import inspect
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import yaml
from absl import flags
from ml_collections import ConfigDict

from align_jax.core import config as configs
from align_jax.core import own
from align_jax.core.choose import nearest
from align_jax.core.options import LENGTHS, Config
from align_jax.runs import early
from align_jax.runs.elsewhere import ELSEWHERE


class ConfigMistake(flags.Error):
    """A config file that cannot be read, or a key that it has not."""


def words(error: BaseException) -> str:
    """Return an error's words; a KeyError's would be quoted, an OSError's begin with a number."""
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


class ConfigFile(flags.ArgumentParser):
    """The parser of ``--config``: runs the file, and says of a mistake in it where it is.

    Args:
        reads: the program reads the model and the data that the config names.
    """

    def __init__(self, reads: bool = False):
        self.reads = reads

    def parse(self, argument: str) -> ConfigDict:
        """Return the file's config; the keys that the command line changes are in it.

        Args:
            argument: a recipe's name, an objective's, or a FILE; after a colon the argument that
                its ``get_config`` takes.

        Raises:
            ConfigMistake: no such file, or one that fails; a key that the config has not.
        """
        if isinstance(argument, ConfigDict):
            return argument
        given = next(i for i, word in enumerate(sys.argv) if re.match("--?config(=|$)", word))
        for key in _changed(sys.argv[given:]):
            _check_spelling(key)
        try:
            early.check(configs.parse(_given(sys.argv[given:])), reads=self.reads)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigMistake(words(error)) from error
        config = load(argument).lock()
        for key in _changed(sys.argv[1:given]):
            raise ConfigMistake(f"--config.{key} changes a key of a config: give --config first")
        keys = list(_changed(sys.argv[given:]))
        for key in keys:
            _check_key(config, key)
        paths = [re.match(r"--?config\.model\.path=(.*)", word) for word in sys.argv[given:]]
        _keep_one_model(config, next((one[1] for one in paths[::-1] if one), None), keys)
        _keep_one_length(config, keys)
        return config


def recipes() -> dict[str, pathlib.Path]:
    """Return the recipes by name: ``configs/`` of a checkout, ``align_jax/recipes`` of a wheel."""
    package = pathlib.Path(__file__).parents[1]
    folders = (package / "recipes", package.parent / "configs")
    folder = next((one for one in folders if one.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}


def find(path: str, *argument: str) -> tuple[str, ...]:
    """Return the file that a config's name means, and the argument of its ``get_config``.

    Args:
        path: of a file, a recipe's name, or an objective's.
        argument: what stood after a colon.

    Raises:
        ConfigMistake: there is none, with the nearest.
    """
    file, known = pathlib.Path(path), recipes()
    if file.is_file():
        return (path, *argument)
    if path in known:
        return (str(known[path]), *argument)
    terms = ":".join((path, *argument)).removeprefix("online_").split("+")
    names = early.names_in("align_jax.losses:OBJECTIVES")
    if all(term in names or own.is_named(term) for term in terms):
        return (str(known["start"]), ":".join((path, *argument)))
    if file.suffix or len(file.parts) > 1:
        beside = [str(one) for kind in ("*.py", "*.y*ml") for one in file.parent.glob(kind)]
        raise ConfigMistake(
            f"--config={path}: no such config file{nearest(path, beside) if beside else ''}"
        )
    close = nearest(path, [*known, *names])
    if "did you mean" not in close:
        close = f"; recipes: {', '.join(known)}"
        if argument:
            close = (
                f", and no module {path!r}: start where it lies, or name its folder in PYTHONPATH"
            )
    raise ConfigMistake(f"--config={path}: no such recipe, objective or config file{close}")


def load(name: str) -> ConfigDict:
    """Return the config that a name means; see this module's docstring.

    Raises:
        ConfigMistake: there is none, or it cannot be read.
    """
    path, *argument = find(*name.split(":", 1))
    file = pathlib.Path(path)
    if file.suffix in (".yaml", ".yml"):
        if argument:
            raise ConfigMistake(f"--config={path}:{argument[0]}: a YAML file takes no argument")
        return _load_yaml(path)
    if file.suffix != ".py":  # whatever it is, it is not run
        raise ConfigMistake(
            f"--config={path}: expected a recipe's name, or a config file, .py or .yaml"
        )
    try:
        found = runpy.run_path(path)
        if "get_config" not in found:
            instead = f"see {recipes()['tiny']} for what a config is"
            if argument and argument[0] in found:
                instead = f"as an objective it is {file.stem}:{argument[0]}"
            raise ConfigMistake(f"{path} has no function get_config; {instead}")
        try:
            inspect.signature(found["get_config"]).bind(*argument)
        except TypeError as error:
            raise ConfigMistake(
                f"{path}: get_config{inspect.signature(found['get_config'])} does not fit "
                f"--config={':'.join((path, *argument))}: {error}; an argument stands after a colon"
            ) from error
        config = found["get_config"](*argument)
    except ConfigMistake:
        raise
    except (Exception, SystemExit) as error:  # whatever the file does is the user's
        if "--debug" in sys.argv[1:]:
            raise
        raise ConfigMistake(_file_message(path, error)) from error
    if not isinstance(config, ConfigDict):
        raise ConfigMistake(
            f"{path}: get_config returned a {type(config).__name__}; expected the ConfigDict that "
            "align_jax.core.config.defaults() makes, with its keys changed"
        )
    return config


class _Yaml(yaml.SafeLoader):
    """Plain values of YAML, with 1e-6 a number, which YAML 1.1 takes for a text."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _load_yaml(path: str) -> ConfigDict:
    """Read a YAML file of the config's keys, nested as they are.

    Raises:
        ConfigMistake: no YAML, a key that the config has not or that stands twice, a value that is
            none of its key's; with the line.
    """
    lines: dict[str, int] = {}
    try:
        loader = _Yaml(pathlib.Path(path).read_text("utf-8"))
        root = loader.get_single_node()
        config = configs.defaults().unlock()
        if root is not None:
            _fill(config, root, loader, path, "", lines)
        configs.parse(config.lock())
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigMistake(f"{path}{line}: no YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigMistake(f"{path}: no YAML: {words(error)}") from error
    except ValueError as error:  # of the values, which are named by their keys
        wrong = re.findall(r"(?m)^  config\.([\w.]+)(.*)$", str(error))
        where = [f"{path}:{lines.get(key, '?')}: config.{key}{rest}" for key, rest in wrong]
        raise ConfigMistake("\n".join(where) or f"{path}: {words(error)}") from error
    return config


def _fill(
    config: ConfigDict, node: yaml.Node, loader: Any, path: str, prefix: str, lines: dict[str, int]
) -> None:
    """Put a YAML mapping's values into a group of keys.

    Raises:
        ConfigMistake: as ``_load_yaml`` does.
    """

    def mistake(at: yaml.Node, said: str) -> ConfigMistake:
        return ConfigMistake(f"{path}:{at.start_mark.line + 1}: {said}")

    if not isinstance(node, yaml.MappingNode):
        what = f"config.{prefix.rstrip('.')} is a group" if prefix else "expected a mapping"
        raise mistake(node, f"{what} of keys, such as seed: 0; got {node.value!r:.60}")
    if prefix == "objective.":  # its own options stand beside its name
        from align_jax import losses

        named = [value.value for key, value in node.value if key.value == "name"]
        try:
            config.update(losses.options(named[0] if named else config.name))
        except (ValueError, KeyError) as error:
            raise mistake(node, words(error)) from error
    for key_node, value_node in node.value:
        key = str(key_node.value)
        name = f"{prefix}{key}"
        if key not in config:
            close = _closest(key, list(config))
            raise mistake(key_node, f"the config has no key {name!r}{close}")
        if name in lines:
            raise mistake(key_node, f"{name} stands on line {lines[name]}, too")
        lines[name] = key_node.start_mark.line + 1
        if isinstance(config[key], ConfigDict) and config[key]:
            _fill(config[key], value_node, loader, path, f"{name}.", lines)
            continue
        try:
            _put(config, key, loader.construct_object(value_node, deep=True), prefix)
        except ConfigMistake as error:
            raise mistake(key_node, words(error)) from error


def changed(config: ConfigDict | Config | Mapping[str, Any], **keys: Any) -> ConfigDict:
    """Return a copy of a config with some keys changed.

    Args:
        config: as ``core.config`` makes it, or nested dicts of the keys that are not at their
            defaults.
        keys: key -> value; a group's in a dict, or by dotted names.

    Raises:
        ConfigMistake: a key that the config has not, with the nearest; an unknown objective.
    """
    known = configs.defaults()
    if isinstance(config, ConfigDict):
        made = config.copy_and_resolve_references().unlock()
    else:
        made = configs.defaults().unlock()
        values = configs.to_dict(config) if isinstance(config, Config) else config
        _change(made, values, "", known)
    _keep_one_length(made, keys)
    given = _dotted(keys)
    _keep_one_model(made, given.get("model.path"), given)
    _change(made, keys, "", known)
    return made.lock()


def _keep_one_model(config: ConfigDict, path: str | None, keys: Collection[str]) -> None:
    """Let a checkpoint that is given take the place of the recipe's random model, or of the fields
    of the recipe's own.

    Args:
        config: the recipe's.
        path: what is given as ``model.path``; None: nothing.
        keys: that are given, dotted.

    Raises:
        ConfigMistake: fields of a random model are given, too.
    """
    if not path:
        return
    if fields := [key for key in keys if re.match(r"model\.(config|family)\b", key)]:
        raise ConfigMistake(
            f"config.{fields[0]} has no effect: it is of random weights, and config.model.path = "
            f"{path!r} names a checkpoint, which has its own"
        )
    config.model.config = ConfigDict()


def _dotted(keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return keys in nested dicts by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in keys.items():
        nested = isinstance(value, Mapping) and value
        found |= _dotted(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def _keep_one_length(config: ConfigDict, keys: Collection[str]) -> None:
    """Let the length that is given take the place of the recipe's, which may be in another unit."""
    if any(name in keys for name in LENGTHS):
        for name in LENGTHS:
            config[name] = type(config[name])(0)


def _change(config: ConfigDict, values: Mapping[str, Any], prefix: str, known: ConfigDict) -> None:
    """Put values into a group of keys; what is an empty dict by default is the user's own, and is
    replaced."""
    if prefix == "objective.":  # its own options stand beside its name
        from align_jax import losses

        name = values.get("name", config.name)
        try:
            own = losses.options(str(name))
        except (ValueError, KeyError) as error:
            raise ConfigMistake(words(error)) from error
        for key in [key for key in config if key not in known and name != config.name]:
            del config[key]
        config.update({key: value for key, value in own.items() if key not in config})
    for name, value in values.items():
        first, _, rest = name.partition(".")
        value = {rest: value} if rest else value
        if first not in config:
            close = _closest(first, list(config))
            raise ConfigMistake(f"the config has no key {prefix + first!r}{close}")
        group = known.get(first)
        if isinstance(group, ConfigDict) and group:
            if not isinstance(value, Mapping):
                raise ConfigMistake(f"{prefix}{first} = {value!r:.60}: expected a dict of its keys")
            _change(config[first], value, f"{prefix}{first}.", group)
            continue
        _put(config, first, value, prefix)


def _put(config: ConfigDict, name: str, value: Any, prefix: str) -> None:
    """Put a value where a key is; types are checked together, with the ranges.

    Raises:
        ConfigMistake: what ml_collections would make a number of.
    """
    if isinstance(config[name], float) and isinstance(value, bool):
        raise ConfigMistake(f"config.{prefix}{name} = {value}: expected a number")
    try:
        with config.ignore_type():
            config[name] = _frozen(value)
    except OverflowError as error:
        raise ConfigMistake(f"config.{prefix}{name}: expected a finite number") from error


def _frozen(value: Any) -> Any:
    """Return lists as tuples and dicts as ConfigDicts, as configs hold them."""
    if isinstance(value, dict):
        return ConfigDict({key: _frozen(inner) for key, inner in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _file_message(path: str, error: BaseException) -> str:
    """Return what went wrong in a config file, with its line."""
    inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
    names = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    lines = [line for line, name in zip(inside, names) if name == path]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f"{path}:{line}" if line else path
    if isinstance(error, (AttributeError, KeyError)):  # ml_collections' own words for a wrong key
        for word in re.findall(r"[\"'](\w+)[\"']", str(error).replace("\\'", "'")):
            if word not in _leaves(configs.defaults()) and not hasattr(ConfigDict, word):
                return f"{where}: the config has no key {word!r}{nearest_key(word)}"
    if isinstance(error, SyntaxError):
        return f"{where}: {error.msg}"
    plain = isinstance(error, ValueError)
    return f"{where}: {'' if plain else type(error).__name__ + ': '}{words(error)}"


def _changed(argv: Sequence[str]) -> Iterator[str]:
    """Return the dotted keys that a command line changes."""
    for word in argv:
        if word == "--":
            return
        if match := re.match(r"--?(?:no)?config\.([^=]+)", word):
            yield match[1]


def _given(argv: Sequence[str]) -> ConfigDict:
    """Return the defaults with what a command line says, before there is a config that it changes.

    Keys that the defaults lack are passed over, and so are groups, tuples and dicts.

    Raises:
        ConfigMistake: what is no value of its key's type.
    """
    config = configs.defaults()
    for word in argv[: argv.index("--") if "--" in argv else None]:
        if not (match := re.match(r"--?config\.([\w.]*?)(\w+)=(.*)", word, re.DOTALL)):
            continue
        group, name, value = match.groups()
        node: Any = config
        for part in group.split(".")[:-1]:
            node = node.get(part) if isinstance(node, ConfigDict) else None
        parser = _PARSERS.get(type(node.get(name))) if isinstance(node, ConfigDict) else None
        if parser is not None:
            try:
                node[name] = parser.parse(value)
            except (ValueError, TypeError) as error:
                kind = _EXPECTED[type(node[name])]
                raise ConfigMistake(f"--config.{group}{name}={value}: expected {kind}") from error
    return config


def _check_key(config: ConfigDict, key: str) -> None:
    """Refuse a key that a config has not.

    Raises:
        ConfigMistake: with the nearest one.
    """
    node: Any = config
    *groups, name = key.split(".")
    for depth, part in enumerate((*groups, name)):
        if isinstance(node, ConfigDict) and part in node:
            node = node[part]
            continue
        group = ".".join(groups[:depth])
        if not isinstance(node, ConfigDict):
            raise ConfigMistake(f"--config.{key}: config.{group} is a value, not a group of keys")
        if group and not node:  # a dict of the user's own, such as config.rewards
            raise ConfigMistake(
                f"--config.{key}: config.{group} is empty; give it whole, as "
                f"--config.{group}=\"{{'{part}': ...}}\""
            )
        own = _leaves(config)  # with the objective's
        if part in own:
            close = f"; did you mean '--config.{own[part]}'?"
        else:
            named = f"--config.{group}.{{}}" if group else "--config.{}"
            close = _closest(part, [*node], named).replace("'config.", "'--config.")
        raise ConfigMistake(f"--config.{key}: the config has no key {part!r}{close}")


def _check_spelling(key: str) -> None:
    """Refuse a key that is near another of its group, before the config is made: a recipe's
    objective imports JAX.

    Raises:
        ConfigMistake: with that key.
    """
    node: Any = configs.defaults()
    for part in key.split(".")[:-1]:
        node = node.get(part) if isinstance(node, ConfigDict) and part != "objective" else None
    if "." in key and isinstance(node, ConfigDict) and node:
        try:
            _check_key(configs.defaults(), key)
        except ConfigMistake as error:
            if "did you mean" in str(error):
                raise


def _leaves(config: ConfigDict, prefix: str = "") -> Mapping[str, str]:
    """Return the last part of every key -> the whole."""
    found: dict[str, str] = {}
    for name, value in config.items():
        inner = _leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {}
        found = {**inner, **found, name: prefix + name}
    return found


def _closest(name: str, here: Sequence[str], named: str = "{}") -> str:
    """Return "did you mean" for a key that is not among those of its group, else which there are.

    Args:
        name: what was given.
        here: the group's keys.
        named: how one of these is written.
    """
    close = nearest(named.format(name), [named.format(one) for one in here])
    away = nearest_key(name)
    return close if "did you mean" in close and name not in ELSEWHERE else away or close


def nearest_key(name: str) -> str:
    """Return "did you mean" for the last part of a key, wherever it stands, or for what other
    trainers call one; "" where none is near."""
    if name in ELSEWHERE:
        return f"; did you mean {ELSEWHERE[name]!r}?"
    leaves = _leaves(configs.defaults())
    close = nearest(name, leaves)
    match = re.match(r"; did you mean '(\w+)'", close)
    return f"; did you mean 'config.{leaves[match[1]]}'?" if match else ""


def list_keys() -> str:
    """Return the config's keys and groups of keys, in a line."""
    config = configs.defaults()
    return ", ".join(
        f"{name}.*" if isinstance(value, ConfigDict) else name for name, value in config.items()
    )


_EXPECTED: Mapping[type, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    tuple: "a tuple, such as (1, 2)",
    ConfigDict: "a dict, such as {'key': 1}",
}
_PARSERS: Mapping[type, flags.ArgumentParser] = {
    bool: flags.BooleanParser(),
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    str: flags.ArgumentParser(),
}


def value_message(error: flags.Error) -> str:
    """Return what is wrong with ``--config.KEY=VALUE``; "" for another error."""
    text = str(error)
    if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith("config."):
        return f"--{error.flagname} changes a key of a config: give --config=FILE, too"
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", text, re.DOTALL)
    if not match:
        return ""
    key, value = match.groups()
    node: Any = flags.FLAGS.config
    for part in key.split("."):
        node = node[part]
    if isinstance(node, ConfigDict) and "name" in node:
        return f"--config.{key}={value}: a group of keys; did you mean --config.{key}.name?"
    kind = next((kind for one, kind in _EXPECTED.items() if isinstance(node, one)), "a text")
    return f"--config.{key}={value}: expected {kind}"
