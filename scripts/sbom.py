#!/usr/bin/env python3
"""Writes the software bill of materials: what the `attn` binary is built of, as CycloneDX 1.5 JSON.

Rust crates with version, licence and checksum come from `cargo metadata` and Cargo.lock (those that are linked or run while building, for
the platform it runs on; crates of tests and of other programs are left out), LibTorch and what its wheel needs from the Python environment that
scripts/setup_env.sh makes. Nothing is stored: scripts/check.sh makes it anew and reads it back.

Usage: scripts/sbom.py [OUT.json]     (target/sbom.cdx.json where no file is named)
"""

import email.parser
import json
import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
REGISTRY = "registry+https://github.com/rust-lang/crates.io-index"
# Distributions of the Python environment that the binary links: LibTorch, and what its libraries need.
LINKED = ("torch", "nvidia-")


def fail(message):
    sys.exit(f"error: {message}")


def metadata():
    host = re.search(r"host: (\S+)", subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout)[1]
    command = ["cargo", "metadata", "--format-version=1", "--locked", "--filter-platform", host]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def reached(found):
    """Ids of the packages that the binary's crate needs outside of its tests, and what each needs."""
    nodes = {node["id"]: node for node in found["resolve"]["nodes"]}
    needs = {}
    todo = [package["id"] for package in found["packages"] if package["name"] == "attn-cli"]
    while todo:
        package = todo.pop()
        if package in needs:
            continue
        kinds = ((dep["pkg"], {kind["kind"] for kind in dep["dep_kinds"]}) for dep in nodes[package]["deps"])
        needs[package] = sorted(other for other, of in kinds if of - {"dev"})
        todo.extend(needs[package])
    return needs


def crate(package, checksums, members):
    name, version = package["name"], package["version"]
    licence = (package["license"] or "").replace("/", " OR ")
    if not licence and not package["license_file"]:
        fail(f"crate `{name}` {version} names no licence")
    made = {
        "type": "library",
        "bom-ref": f"pkg:cargo/{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:cargo/{name}@{version}",
        "licenses": [{"expression": licence} if licence else {"license": {"name": package["license_file"]}}],
    }
    if package["id"] not in members:
        if package["source"] != REGISTRY:
            fail(f"crate `{name}` {version} comes from {package['source']}, expected crates.io")
        made["hashes"] = [{"alg": "SHA-256", "content": checksums[name, version]}]
    if package["repository"]:
        made["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return made


def wheels():
    """The distributions that are linked, by their metadata."""
    made = []
    for path in sorted(ROOT.glob(".venv/lib/python3*/site-packages/*.dist-info/METADATA")):
        told = email.parser.Parser().parsestr(path.read_text(encoding="utf-8"))
        name, version = told["Name"].lower(), told["Version"]
        if not name.startswith(LINKED):
            continue
        licence = told["License-Expression"] or (told["License"] or "see its metadata").strip().splitlines()[0]
        made.append({
            "type": "library",
            "bom-ref": f"pkg:pypi/{name}@{version}",
            "name": "LibTorch" if name == "torch" else name,
            "version": version,
            "purl": f"pkg:pypi/{name}@{version}",
            "licenses": [{"license": {"name": licence}}],
        })
    return made


def bill():
    found = metadata()
    needs, members = reached(found), set(found["workspace_members"])
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text(encoding="utf-8"))["package"]
    checksums = {(package["name"], package["version"]): package.get("checksum") for package in lock}
    packages = {package["id"]: package for package in found["packages"]}
    refs = {key: f"pkg:cargo/{package['name']}@{package['version']}" for key, package in packages.items()}
    crates = [crate(packages[key], checksums, members) for key in needs]
    crates.sort(key=lambda made: made["bom-ref"])
    libraries = wheels()
    if not any(made["name"] == "LibTorch" for made in libraries):
        fail("there is no LibTorch in .venv\nhint: scripts/setup_env.sh puts it there")
    program = next(made for made in crates if made["name"] == "attn-cli")
    edges = [{"ref": refs[key], "dependsOn": sorted(refs[other] for other in of)} for key, of in needs.items()]
    torch = [made["bom-ref"] for made in libraries]
    next(edge for edge in edges if "torch-sys@" in edge["ref"])["dependsOn"].extend(torch)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": {**program, "type": "application", "name": "attn"}},
        "components": [made for made in crates if made is not program] + libraries,
        "dependencies": sorted(edges, key=lambda edge: edge["ref"]),
    }


def check(made):
    """Every crate is there once, and every edge leads to one."""
    refs = [part["bom-ref"] for part in made["components"]] + [made["metadata"]["component"]["bom-ref"]]
    if len(refs) != len(set(refs)):
        fail("a component is there twice")
    for edge in made["dependencies"]:
        for other in [edge["ref"], *edge["dependsOn"]]:
            if other not in refs:
                fail(f"`{other}` is needed and is no component")
    if not all(part["licenses"] for part in made["components"]):
        fail("a component is without a licence")


def main():
    out = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "target" / "sbom.cdx.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(bill(), indent=1) + "\n", encoding="utf-8")
    made = json.loads(out.read_text(encoding="utf-8"))
    check(made)
    print(f"{out}: {len(made['components'])} components")


if __name__ == "__main__":
    main()
