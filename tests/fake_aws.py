"""A stand-in for the AWS CLI: answers from a file, notes what it was asked, knows the parameters of each call.

It is run as a program, with the folder of both files in AWS_FAKE. `answers.json` holds for `SERVICE OPERATION` what AWS
would answer; an answer that is a number is an exit code.
"""

import json
import os
import sys
from pathlib import Path

GLOBAL = {"--query", "--output"}
CUSTOM = {"cloudformation deploy", "ecs wait"}  # what the CLI adds to the API


def main(arguments):
    """Answer one call; return the exit code."""
    folder = Path(os.environ["AWS_FAKE"])
    command, options = " ".join(arguments[:2]), arguments[2:]
    with (folder / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    if command not in CUSTOM:
        _refuse_unknown(*arguments[:2], [each for each in options if each.startswith("--")])
    answer = json.loads((folder / "answers.json").read_text()).get(command, {})
    if isinstance(answer, int):
        return answer
    if "--query" in options:
        import jmespath

        found = jmespath.search(options[options.index("--query") + 1], answer)
        sys.stdout.write(f"{_text(found)}\n")
    return 0


def _refuse_unknown(service, operation, options):
    import botocore.session  # only where it is needed: it takes a quarter of a second
    from botocore import xform_name

    model = botocore.session.get_session().get_service_model(service)
    operations = {xform_name(name, "-"): name for name in model.operation_names}
    known = {f"--{xform_name(name, '-')}" for name in model.operation_model(operations[operation]).input_shape.members}
    switches = {option.replace("--no-", "--") for option in options}
    if unknown := switches - known - GLOBAL:
        raise SystemExit(f"unknown: {unknown}")


def _text(found):
    """Write a value as `--output text` does."""
    if isinstance(found, list):
        return "\t".join(_text(each) for each in found)
    return "None" if found is None else str(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
