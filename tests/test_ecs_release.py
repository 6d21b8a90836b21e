"""Releases on ECS: permissions, pipeline and scripts of deploy/ecs."""

import re
from pathlib import Path

import pytest

pytest.importorskip("cfnlint", reason="cfn-lint is not installed")

from cloudformation import FOLDER, load, of_type, statements

pytestmark = pytest.mark.system

STACKS = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
TEMPLATES = {name: load(name) for name in STACKS}

# Actions for which AWS defines no resource (Service Authorization Reference).
WITHOUT_RESOURCE = {
    "ecr:GetAuthorizationToken",
    "ecs:DeregisterTaskDefinition",
    "ecs:DescribeTaskDefinition",
    "ecs:RegisterTaskDefinition",
}
DESCRIPTIONS = re.compile(r"(ec2|elasticloadbalancing|application-autoscaling|cloudwatch):Describe\w+")


class TestRights:
    @pytest.mark.parametrize("name", STACKS)
    def test_permissions_name_each_action(self, name):
        """Without wildcards."""
        actions = {
            action
            for _, statement in statements(TEMPLATES[name])
            for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
        }

        assert not {action for action in actions if "*" in action}

    @pytest.mark.parametrize("name", STACKS)
    def test_permissions_name_their_resource(self, name):
        """Except for actions that AWS defines without one."""
        for _, statement in statements(TEMPLATES[name]):
            resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
            actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
            if "*" in resources:
                unexplained = {
                    each for each in actions if each not in WITHOUT_RESOURCE and not DESCRIPTIONS.fullmatch(each)
                }
                assert not unexplained

    def test_each_task_has_its_own_database_user(self):
        """Only one task has the owner's password."""
        by_role = {}
        for role, statement in statements(TEMPLATES["cluster"]):
            by_role.setdefault(role, []).append(str(statement))

        assert "/app" in str(by_role["ServiceRole"])
        assert "/migrator" in str(by_role["MigrationRole"])
        assert [role for role, said in by_role.items() if "owner-secret" in str(said)] == ["RolesStartRole"]
        assert "RolesStartRole" not in str(TEMPLATES["service"])
        (roles,) = (
            task
            for task in of_type(TEMPLATES["tasks"], "AWS::ECS::TaskDefinition").values()
            if "roles-start-role" in str(task)
        )
        assert roles["ContainerDefinitions"][0]["Name"] == "roles"

    def test_stacks_of_the_pipeline_contain_no_roles(self):
        """So that a release cannot extend its permissions."""
        kinds = {
            resource["Type"] for name in ("tasks", "service") for resource in TEMPLATES[name]["Resources"].values()
        }
        actions = {
            str(statement["Action"]) for _, statement in statements(TEMPLATES["release"]) if "iam:" in str(statement)
        }

        assert not {kind for kind in kinds if kind.startswith("AWS::IAM::")}
        assert actions == {"iam:PassRole", "iam:CreateServiceLinkedRole"}

    def test_pass_role_names_its_service(self):
        """Every iam:PassRole statement restricts the service that may receive the role."""
        passed = [
            statement for _, statement in statements(TEMPLATES["release"]) if "iam:PassRole" in statement["Action"]
        ]

        assert len(passed) == 3
        assert all("iam:PassedToService" in statement["Condition"]["StringEquals"] for statement in passed)


class TestPipeline:
    def test_pipeline_order_is_test_build_migrate_release(self):
        """Each stage is one action."""
        (pipeline,) = of_type(TEMPLATES["pipeline"], "AWS::CodePipeline::Pipeline").values()

        stages = [(stage["Name"], len(stage["Actions"])) for stage in pipeline["Stages"]]

        assert stages == [(name, 1) for name in ("Source", "Test", "Build", "Migrate", "Deploy")]

    def test_test_project_may_only_read_source_and_write_logs(self):
        """The role of the test project, which runs branch code, has neither the push nor the release policy."""
        roles = of_type(TEMPLATES["pipeline"], "AWS::IAM::Role")

        extra = {
            name: [policy for policy in role["ManagedPolicyArns"] if policy != {"Ref": "BuildPolicy"}]
            for name, role in roles.items()
            if "ManagedPolicyArns" in role
        }

        assert {name: str(policies).count("-policy") for name, policies in extra.items()} == {
            "TestRole": 0,
            "BuildRole": 1,
            "ReleaseRole": 1,
        }
        assert "push-policy" in str(extra["BuildRole"])
        assert "release-policy" in str(extra["ReleaseRole"])

    @pytest.mark.parametrize("project", ["Test", "Build", "Migrate", "Deploy"])
    def test_buildspecs_exist_and_their_variables_are_set(self, project):
        """Every CodeBuild project has a buildspec file, and each variable that the file reads is set."""
        properties = TEMPLATES["pipeline"]["Resources"][project]["Properties"]
        path = FOLDER / Path(properties["Source"]["BuildSpec"]["Fn::Sub"]).name
        (pipeline,) = of_type(TEMPLATES["pipeline"], "AWS::CodePipeline::Pipeline").values()
        (action,) = next(stage for stage in pipeline["Stages"] if stage["Name"] == project)["Actions"]
        text = path.read_text()

        read = set(re.findall(r"\$\{?([A-Z_]+)", text))

        known = {each["Name"] for each in properties["Environment"]["EnvironmentVariables"]}
        known |= set(re.findall(r'"name": "(\w+)"', str(action["Configuration"].get("EnvironmentVariables", ""))))
        known |= {"CODEBUILD_RESOLVED_SOURCE_VERSION", "CODEBUILD_BUILD_NUMBER"}
        assert not read - known - set(re.findall(r"export ([A-Z]+)=", text))

    def test_later_stages_use_the_digest_of_the_build(self):
        """So that the tested image is deployed."""
        text = (FOLDER / "buildspec-build.yml").read_text()

        exported = set(re.search(r"exported-variables: \[(.*)\]", text)[1].split(", "))

        assert exported == set(re.findall(r"#\{Build\.(\w+)\}", str(TEMPLATES["pipeline"])))
        assert "RepoDigests" in text

    def test_build_time_out_exceeds_that_of_run_task(self):
        """Whose message is more precise."""
        project = TEMPLATES["pipeline"]["Resources"]["Migrate"]["Properties"]
        hours = int(re.search(r"TASK_HOURS:-(\d+)", (FOLDER / "run-task.sh").read_text())[1])

        assert project["TimeoutInMinutes"] > 60 * hours + 10
        assert TEMPLATES["release"]["Resources"]["GitHubRole"]["Properties"]["MaxSessionDuration"] > 3600 * hours + 600
