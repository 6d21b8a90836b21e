"""Load CloudFormation templates as data, and create stacks from them in moto, for the tests of deploy/ecs."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cfnlint.decode

__all__ = ["FOLDER", "Account", "containers", "default", "load", "of_type", "statements"]

FOLDER = Path(__file__).resolve().parent.parent / "deploy" / "ecs"

# Resources that moto's CloudFormation does not create. References to them get a placeholder.
_UNKNOWN_TO_MOTO = (
    "AWS::ApplicationAutoScaling::",
    "AWS::CloudWatch::Alarm",
    "AWS::CodeBuild::",
    "AWS::CodePipeline::",
    "AWS::EC2::SecurityGroupEgress",
    "AWS::ECS::ExpressGatewayService",
    "AWS::ElastiCache::",
    "AWS::RDS::DBInstance",  # only without a parameter group
    "AWS::S3::BucketPolicy",
    "AWS::SecretsManager::Secret",
    "AWS::SNS::Subscription",
)


def load(name: str) -> dict[str, Any]:
    """Return a template, with `Fn::` for every short form."""
    template, problems = cfnlint.decode.decode(str(FOLDER / f"{name}.yaml"))
    assert not problems
    return json.loads(json.dumps(template))


def of_type(template: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the properties of all resources of a type, by their names."""
    return {
        name: resource.get("Properties", {})
        for name, resource in template["Resources"].items()
        if resource["Type"] == kind
    }


def default(template: Mapping[str, Any], parameter: str) -> Any:
    """Return the default of a parameter."""
    return template["Parameters"][parameter]["Default"]


def containers(template: Mapping[str, Any]) -> dict[str, Any]:
    """Return the containers of all task definitions, by their names."""
    tasks = of_type(template, "AWS::ECS::TaskDefinition").values()
    return {container["Name"]: container for task in tasks for container in task["ContainerDefinitions"]}


def statements(template: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each statement of a policy, with the name of its role or policy."""
    documents = [
        (name, policy["PolicyDocument"])
        for name, role in of_type(template, "AWS::IAM::Role").items()
        for policy in role.get("Policies", ())
    ]
    documents += [
        (name, policy["PolicyDocument"]) for name, policy in of_type(template, "AWS::IAM::ManagedPolicy").items()
    ]
    for name, document in documents:
        for statement in document["Statement"]:
            yield name, statement["Fn::If"][1] if "Fn::If" in statement else statement


class Account:
    """An account in moto; its stacks are created as deploy/ecs/README.md describes.

    Args:
        client: Opens a client of boto3.
        name: `Name` of all stacks.
    """

    def __init__(self, client: Any, name: str) -> None:
        self.client = client
        self.name = name
        self._cloudformation = client("cloudformation")

    def create(self, template: str, **parameters: str) -> dict[str, str]:
        """Create a stack and return its outputs."""
        stack = f"{self.name}-{template}"
        given = {"Name": self.name, **parameters}
        self._cloudformation.create_stack(
            StackName=stack,
            TemplateBody=json.dumps(_without_what_moto_lacks(load(template))),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
        )
        described = self._cloudformation.describe_stacks(StackName=stack)["Stacks"][0]
        assert described["StackStatus"] == "CREATE_COMPLETE"
        return {output["OutputKey"]: output["OutputValue"] for output in described.get("Outputs", ())}


def _without_what_moto_lacks(template: dict[str, Any]) -> dict[str, Any]:
    lacking = {
        name for name, resource in template["Resources"].items() if resource["Type"].startswith(_UNKNOWN_TO_MOTO)
    }
    kept = {name: resource for name, resource in template["Resources"].items() if name not in lacking}
    for resource in kept.values():
        if resource.get("DependsOn") in lacking:
            del resource["DependsOn"]
    return _with_placeholders({**template, "Resources": kept}, lacking)


def _with_placeholders(value: Any, lacking: set[str]) -> Any:
    match value:
        case {"Ref": str(name)} | {"Fn::GetAtt": [str(name), _]} if name in lacking:
            return f"{name.lower()}.placeholder"
        case dict():
            return {key: _with_placeholders(each, lacking) for key, each in value.items()}
        case list():
            return [_with_placeholders(each, lacking) for each in value]
    return value
