"""A fake of the AWS CLI: returns answers from a file, records its calls, and checks their parameters.

`Aws` puts it on a PATH; then it is run as a program, with the folder of both files in AWS_FAKE. `answers.json` holds
for `SERVICE OPERATION` what AWS would answer; an answer that is a number is an exit code.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

NAME = "shop-prod"
TASK = f"arn:aws:ecs:eu-central-1:123456789012:task/{NAME}/0123abcd"
DEFINITION = f"arn:aws:ecs:eu-central-1:123456789012:task-definition/{NAME}-migrate:7"
OUTPUTS = {"migrate": DEFINITION, "TaskSubnets": "subnet-1,subnet-2", "ServiceGroup": "sg-1"}
PARAMETERS = {"Image": "image@sha256:0", "Version": "1.0.0"}  # the deployed parameters

GLOBAL = {"--query", "--output"}
CUSTOM = {
    "cloudformation deploy",
    "ecr get-login-password",
    "ecs wait",
}  # commands of the CLI alone


class Aws:
    """Put the fake first on the PATH of the commands that `run` starts."""

    def __init__(self, folder):
        self._folder = folder
        program = folder / "aws"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__)}" "$@"\n')
        program.chmod(0o755)
        self.outputs = dict(OUTPUTS)
        self.answers = {
            "ecs run-task": {"tasks": [{"taskArn": TASK}]},
            "logs get-log-events": {"events": [{"message": "Running upgrade"}, {"message": "Done: 1 migration"}]},
        }

    def ends(self, status="STOPPED", code=0, reason="Essential container in task exited"):
        """Set how the task ends; a container that never started has no exit code."""
        container = {} if code is None else {"exitCode": code}
        task = {"lastStatus": status, "stoppedReason": reason, "containers": [container]}
        self.answers["ecs describe-tasks"] = {"tasks": [task]}

    def environment(self):
        """Write the answers to their file; return the variables for commands that call the fake."""
        outputs = [{"OutputKey": key, "OutputValue": value} for key, value in self.outputs.items()]
        parameters = [{"ParameterKey": key, "ParameterValue": value} for key, value in PARAMETERS.items()]
        stacks = {"Stacks": [{"Outputs": outputs, "Parameters": parameters}]}
        answers = {"cloudformation describe-stacks": stacks, **self.answers}
        (self._folder / "answers.json").write_text(json.dumps(answers))
        return {"PATH": f"{self._folder}{os.pathsep}{os.environ['PATH']}", "AWS_FAKE": str(self._folder)}

    def run(self, *command, **environment):
        """Run a command; return its exit code, standard output and standard error."""
        done = subprocess.run(
            command,
            env=self.environment() | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def calls(self, command):
        """Return the arguments of each call of a command."""
        lines = (self._folder / "calls.jsonl").read_text().splitlines()
        return [call[2:] for call in map(json.loads, lines) if " ".join(call[:2]) == command]

    def deployed(self):
        """Return the parameters of each deployment of a stack."""
        calls = self.calls("cloudformation deploy")
        return [call[call.index("--parameter-overrides") + 1 :] for call in calls]


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
    """Write a value in the format of `--output text`."""
    if isinstance(found, list):
        return "\t".join(_text(each) for each in found)
    return "None" if found is None else str(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
