"""Write a script and all that it imports from this project into one file, for those who copy a script into a notebook.

    python colab/bundle.py train_vit.py        writes colab/train_vit.py

Run it in the root of the repository. The file needs the packages of requirements.txt and nothing of this project.
"""

import ast
import sys
import textwrap
from pathlib import Path

FAMILIES = {  # {script: the modules of models/ that its build_model may need}
    "train_vit.py": ("models.vit", "models.pretrained"),
    "train_cct.py": ("models.cct", "models.nano"),
    "train_resnet_attn.py": ("models.resnet", "models.xresnet"),
    "rollout.py": ("models.vit", "models.pretrained", "models.cct", "models.nano", "models.resnet", "models.xresnet"),
}
HEADER = """# {script} and all that it imports from its project in one file, written by colab/bundle.py: edit it there.
# In a notebook cell it takes its arguments from this list, and as a script from the command line.
ARGUMENTS = ["--dataset", "shapes"]
"""
FOOTER = """if __name__ == "__main__":
    if "ipykernel" in sys.modules:
        result = main(ARGUMENTS)
    else:
        run_script(main)
"""


ORDER = ("errors", "seeding", "files", "models", "pipeline", "data", "training", "maps")  # of the rooms in a file


def module_file(name):
    """The file of a module of this project; None for a package from elsewhere."""
    for path in (Path(f"{name.replace('.', '/')}.py"), Path(name.replace(".", "/"), "__init__.py")):
        if path.exists():
            return path
    return None


def own_imports(node):
    """The imports from this project anywhere below a node."""
    found = [inner for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom)]
    return [inner for inner in found if module_file(inner.module)]


def names_in(node, context):
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, context)}


class Statement:
    """A statement at the top level of a file: the names it defines and uses, and its source lines.

    The lines are without the project's imports, and without branches that import a family of models not in `families`.
    """

    def __init__(self, node, source, families):
        is_definition = isinstance(node, ast.FunctionDef | ast.ClassDef)
        self.defines = {node.name} if is_definition else names_in(node, ast.Store)
        branches = [inner for inner in ast.walk(node) if isinstance(inner, ast.If) and not inner.orelse]
        self.dropped = {}  # lines
        for inner in [*own_imports(node), *(branch for branch in branches if self.is_foreign(branch, families))]:
            self.dropped |= dict.fromkeys(range(inner.lineno, inner.end_lineno + 1))
        kept = [inner for inner in ast.walk(node) if getattr(inner, "lineno", 0) not in self.dropped]
        self.uses = {inner.id for inner in kept if isinstance(inner, ast.Name)}
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        while first > 1 and source[first - 2].startswith("#"):
            first -= 1
        self.lines, self.is_definition = [], is_definition
        for number in range(first, node.end_lineno + 1):
            after_dropped = number - 1 in self.dropped and not source[number - 1].strip()
            if number not in self.dropped and not after_dropped:
                self.lines.append(source[number - 1])

    @staticmethod
    def is_foreign(branch, families):
        modules = {inner.module for inner in branch.body if isinstance(inner, ast.ImportFrom)}
        return any(module.startswith("models.") and module not in families for module in modules)


def gather(path, families, found):
    """Fill found, {path: (title, imports from elsewhere, Statements)}: first what a file imports, then the file."""
    if path in found:
        return
    source = path.read_text().splitlines()
    tree = ast.parse("\n".join(source))
    for node in own_imports(tree):
        if path != Path("models/__init__.py") or node.module in (*families, "errors"):
            gather(module_file(node.module), families, found)
    imports, statements = [], []
    for node in tree.body[1:]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports += [] if own_imports(node) else [node]
        elif "__main__" not in ast.dump(node):
            statements.append(Statement(node, source, families))
    found[path] = ast.get_docstring(tree).split("\n")[0], imports, statements


def needed(files):
    """The Statements that main and run_script need, directly or not."""
    statements = [statement for _, _, statements in files.values() for statement in statements]
    by_name = {name: statement for statement in statements for name in statement.defines}
    waiting, kept = ["main", "run_script"], set()
    while waiting:
        statement = by_name.get(waiting.pop())
        if statement and statement not in kept:
            kept.add(statement)
            waiting += statement.uses
    return kept | {statement for statement in statements if not statement.defines}


def import_lines(nodes, used):
    """The imports of the names in `used`, once each, the standard library first. Raises ValueError for a clash."""
    origins, whole, parts = {}, set(), {}
    for node in nodes:
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            origin = (getattr(node, "module", None), alias.name)
            if name not in used:
                continue
            if origins.setdefault(name, origin) != origin and alias.asname:
                raise ValueError(f"{name} is {origins[name]} in one file and {origin} in another")
            text = alias.name + (f" as {alias.asname}" if alias.asname else "")
            if isinstance(node, ast.Import):
                whole.add(text)
            else:
                parts.setdefault(node.module, set()).add(text)
    lines = {name: f"import {name}" for name in whole}
    for module, names in parts.items():
        line = f"from {module} import {', '.join(sorted(names))}"
        if len(line) > 120:
            wrapped = textwrap.fill(
                ", ".join(sorted(names)) + ",", 116, initial_indent="    ", subsequent_indent="    "
            )
            line = f"from {module} import (\n{wrapped}\n)"
        lines[f"{module} "] = line
    standard = [n for n in lines if n.split(".")[0].split(" ")[0] in sys.stdlib_module_names]
    groups = standard, [name for name in lines if name not in standard]
    return "\n\n".join("\n".join(lines[name] for name in sorted(group)) for group in groups)


def bundle(script):
    """The text of a script's single file."""
    files = {}
    gather(Path(script), FAMILIES[script], files)
    rooms = {path: path.with_suffix("").parts[0] for path in files}
    files = {path: files[path] for path in sorted(files, key=lambda path: [*ORDER, rooms[path]].index(rooms[path]))}
    kept = needed(files)
    nodes = [node for _, imports, _ in files.values() for node in imports]
    used = {name for statement in kept for name in statement.uses} | {"sys"}
    imports = import_lines(nodes, used)
    parts = [HEADER.format(script=script), imports]
    for path, (title, _, statements) in files.items():
        text, before = "", None
        for statement in (statement for statement in statements if statement in kept):
            apart = before and (statement.is_definition or before.is_definition)
            text += ("\n\n\n" if apart else "\n" if before else "") + "\n".join(statement.lines)
            before = statement
        if text:
            parts.append(f"\n# ---- {path}: {title}\n\n{text}")
    return "\n\n".join([*parts, FOOTER])


def main(argv=None):
    for script in argv or sys.argv[1:] or FAMILIES:
        path = Path("colab", script)
        path.write_text(bundle(script))
        print(f"{path}: {len(path.read_text().splitlines()):,} lines")


if __name__ == "__main__":
    main()
