"""The CloudFormation templates of deploy/ecs: valid, and consistent with each other and with the service."""

import ipaddress
import json
import os
import re
from functools import partial

import pytest

from fastapi_prodkit import Settings, create_app
from fastapi_prodkit._config.variables import variables as variables_of

pytest.importorskip("cfnlint", reason="cfn-lint is not installed")
pytest.importorskip("moto", reason="moto is not installed")

import boto3
import cfnlint.api
import moto
import trustme
from cloudformation import FOLDER, Account, containers, default, load, of_type
from fastapi import Request
from fastapi.testclient import TestClient

from fastapi_prodkit.auth import public
from fastapi_prodkit.sections import HealthSettings, LimitsSettings, ShutdownSettings

pytestmark = pytest.mark.system

STACKS = ("network", "data", "cluster", "tasks", "service", "release", "pipeline", "express")
TEMPLATES = {name: load(name) for name in STACKS}
NAME = "shop-prod"
DOMAIN = "api.example.com"
IMAGE = f"123456789012.dkr.ecr.eu-central-1.amazonaws.com/{NAME}@sha256:{'0' * 64}"
PAGE = FOLDER.parent.parent / "docs" / "deploy" / "ecs.md"

# The values of the secrets of data.yaml, as ECS would set them as variables.
SECRETS = {
    "RATE_LIMIT_STORAGE_URL": "rediss://:token@cache.example:6379/0",
    "METRICS_TOKEN": "m" * 43,
    "LOG_LEVEL": "INFO",
}
ISSUER = {"AuthIssuer": "https://login.invalid/", "AuthAudience": NAME}
NOT_OURS = {"AWS_DEFAULT_REGION", "WEB_CONCURRENCY"}  # boto3's and uvicorn's


@pytest.fixture(scope="module")
def stacks():
    """Create all stacks in moto, in the order of the page; return the account and the outputs of each."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            patch.setenv(variable, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
        patch.delenv("AWS_PROFILE", raising=False)
        with moto.mock_aws():
            certificate = boto3.client("acm").request_certificate(DomainName=DOMAIN)["CertificateArn"]
            connection = "arn:aws:codeconnections:eu-central-1:123456789012:connection/1"
            account = Account(partial(boto3.client, region_name="eu-central-1"), NAME)
            outputs = {
                "network": account.create("network"),
                "data": account.create("data"),
                "cluster": account.create("cluster"),
                "tasks": account.create("tasks", Image=IMAGE),
                "service": account.create("service", Image=IMAGE, Domain=DOMAIN, Certificate=certificate, **ISSUER),
                "release": account.create("release", GitHubRepository="shop/api", HostedZone="Z1"),
                "pipeline": account.create("pipeline", Connection=connection, Repository="shop/api"),
            }
            yield account, outputs


@pytest.fixture(scope="module")
def variables(stacks):
    """Return the environment of each container, as ECS passes it to the process."""
    ecs = stacks[0].client("ecs")
    found = {}
    for family in (NAME, f"{NAME}-migrate", f"{NAME}-roles"):
        (container,) = ecs.describe_task_definition(taskDefinition=family)["taskDefinition"]["containerDefinitions"]
        secrets = {secret["name"]: SECRETS.get(secret["name"], "secret") for secret in container.get("secrets", ())}
        found[container["name"]] = {each["name"]: each["value"] for each in container["environment"]} | secrets
    return found


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Return a function that sets the process's environment to that of a container."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.upper() in {*variables_of(Settings), *NOT_OURS}:
            monkeypatch.delenv(name)

    def enter(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return enter


def ports(template):
    """Return every number that is the port of the service."""
    (targets,) = of_type(template, "AWS::ElasticLoadBalancingV2::TargetGroup").values()
    (service,) = of_type(template, "AWS::ECS::Service").values()
    container = containers(template)["service"]
    probe = re.search(r":(\d+)/", container["HealthCheck"]["Command"][-1])
    return {
        targets["Port"],
        service["LoadBalancers"][0]["ContainerPort"],
        container["PortMappings"][0]["ContainerPort"],
        int(probe[1]),
    }


def seconds(name):
    """Return a number of seconds from the task definition."""
    return float(
        {each["Name"]: each["Value"] for each in containers(TEMPLATES["service"])["service"]["Environment"]}[name]
    )


class TestTemplates:
    @pytest.mark.parametrize("name", STACKS)
    def test_templates_pass_cfn_lint(self, name):
        """Neither errors nor warnings."""
        found = cfnlint.api.lint_file(FOLDER / f"{name}.yaml")

        assert [str(match) for match in found] == []

    def test_every_template_is_tested(self):
        """STACKS lists every CloudFormation template of the folder, so that no template stays untested."""
        assert {path.stem for path in FOLDER.glob("*.yaml")} == set(STACKS)

    @pytest.mark.parametrize("name", STACKS)
    def test_template_is_small_enough_without_a_bucket(self, name):
        """Longer templates than 51 200 bytes need S3."""
        assert (FOLDER / f"{name}.yaml").stat().st_size < 51_200

    def test_stacks_import_exports_of_earlier_stacks(self, stacks):
        """The stacks can be created one after the other, because each import matches an earlier export."""
        account, outputs = stacks

        exports = account.client("cloudformation").list_exports()["Exports"]

        assert {export["Name"].removeprefix(f"{NAME}-").split("-")[0] for export in exports} > {
            "task",
            "database",
            "start",
        }
        assert outputs["service"]["Url"] == f"https://{DOMAIN}"
        assert outputs["tasks"]["migrate"].endswith(f"task-definition/{NAME}-migrate:1")

    @pytest.mark.parametrize("name", STACKS)
    def test_parameters_are_described_in_template_and_page(self, name):
        """With their defaults."""
        rows = PAGE.read_text() + (PAGE.parent / "ecs-express.md").read_text()

        for parameter, declared in TEMPLATES[name]["Parameters"].items():
            shown = f"`{declared['Default']}`" if str(declared.get("Default", "")) else ""
            assert declared["Description"].strip()
            assert re.search(rf"^\| `{parameter}` .*{re.escape(shown)}", rows, re.MULTILINE), parameter


class TestEnvironment:
    @pytest.mark.parametrize("container", ["service", "migrate"])
    def test_settings_accept_the_variables_of_the_container(self, variables, environment, container):
        """As those of production, without warnings."""
        environment(variables[container])

        settings = Settings()

        assert settings.environment == "prod"
        assert settings.database.iam_auth
        assert settings.database.ssl == "verify-full"

    @pytest.mark.parametrize("container", ["service", "migrate"])
    def test_variables_of_the_container_are_settings(self, variables, container):
        """Every environment variable of a container is a known setting, which rules out misspelt names."""
        assert not variables[container].keys() - {*variables_of(Settings), *NOT_OURS}

    def test_app_answers_behind_the_load_balancer(self, variables, environment, tmp_path):
        """Probes with any host, other requests for the domain only; the client is that of the load balancer."""
        authority = trustme.CA()
        authority.cert_pem.write_to_path(tmp_path / "bundle.pem")
        (tmp_path / "alembic.ini").write_text("[alembic]\nscript_location = %(here)s\npath_separator = os\n")
        environment(
            variables["service"] | {"DATABASE_SSL_ROOT_CERT": str(tmp_path / "bundle.pem"), "LOG_ENABLED": "false"}
        )
        pytest.importorskip("asyncpg", reason="the extra database is not installed")
        app = create_app()

        @app.get("/me")
        @public
        def me(request: Request):
            return request.client.host, request.url.scheme

        (target_group,) = of_type(TEMPLATES["service"], "AWS::ElasticLoadBalancingV2::TargetGroup").values()
        balancer, neighbour = (
            TestClient(app, base_url=f"http://{DOMAIN}", client=(address, 4000))
            for address in ("10.0.1.7", "10.0.16.7")
        )
        said = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}

        with balancer:
            assert balancer.get("/health", headers={"Host": "10.0.16.5:8000"}).status_code == 200
            assert balancer.get(target_group["HealthCheckPath"], headers={"Host": "10.0.16.5:8000"}).status_code == 503
            assert balancer.get("/me", headers=said).json() == ["203.0.113.9", "https"]
            assert neighbour.get("/me", headers=said).json() == ["10.0.16.7", "http"]
            assert balancer.get("/me", headers={"Host": "10.0.16.5:8000"}).status_code == 400

    def test_only_subnets_of_the_load_balancer_are_trusted(self, stacks, variables):
        """PROXY_TRUSTED contains exactly the CIDR blocks of the subnets of the load balancer."""
        account, outputs = stacks
        (balancer,) = account.client("elbv2").describe_load_balancers()["LoadBalancers"]
        subnets = account.client("ec2").describe_subnets(
            SubnetIds=[zone["SubnetId"] for zone in balancer["AvailabilityZones"]]
        )["Subnets"]

        trusted = variables["service"]["PROXY_TRUSTED"].split(",")

        assert set(trusted) == {subnet["CidrBlock"] for subnet in subnets}
        assert {subnet["SubnetId"] for subnet in subnets} == set(outputs["network"]["PublicSubnets"].split(","))
        assert all(ipaddress.ip_network(network).num_addresses < 2**16 for network in trusted)

    def test_migrations_use_the_same_database_as_the_owner(self, variables):
        """The migration task has the database settings of the service, but connects as the table owner."""
        service, migrate = variables["service"], variables["migrate"]

        same = {name for name in migrate if name.startswith("DATABASE_")} - {"DATABASE_URL"}

        assert {name: migrate[name] for name in same} == {name: service[name] for name in same}
        assert migrate["DATABASE_URL"] == service["DATABASE_URL"].replace("//app@", "//migrator@")
        assert "HOSTS_ALLOWED" not in migrate

    def test_no_variable_contains_a_secret(self, variables):
        """Secrets are references, and no URL has a password."""
        for container in [each for template in TEMPLATES.values() for each in containers(template).values()]:
            named = {each["Name"] for each in container["Environment"]}
            assert not {name for name in named if re.search(r"TOKEN|PASSWORD|SECRET$|STORAGE_URL", name)}
        assert not re.search(r"//\w+:", variables["service"]["DATABASE_URL"] + variables["migrate"]["DATABASE_URL"])


class TestTheContainer:
    @pytest.mark.parametrize(
        ("template", "name"), [("service", "service"), ("tasks", "migrate"), ("tasks", "roles"), ("express", "Main")]
    )
    def test_container_runs_without_privileges(self, template, name):
        """A fixed uid other than root, a read-only file system, and no capabilities."""
        container = containers(TEMPLATES[template])[name]

        assert container["User"] == "10001:10001"
        assert container["ReadonlyRootFilesystem"] is True
        assert container["LinuxParameters"]["Capabilities"]["Drop"] == ["ALL"]

    def test_port_is_the_same_everywhere(self):
        """Process, container, target group, service, security groups and `fastapi-prodkit serve`."""
        rules = [
            rule
            for kind in ("Ingress", "Egress")
            for rule in of_type(TEMPLATES["network"], f"AWS::EC2::SecurityGroup{kind}").values()
            if "LoadBalancerGroup" in str(rule)
        ]

        assert ports(TEMPLATES["service"]) == {8000}
        assert {port for rule in rules for port in (rule["FromPort"], rule["ToPort"])} == {8000}
        assert len(rules) == 2

    def test_migrations_run_in_the_image_of_the_release(self):
        """By our command."""
        pytest.importorskip("typer", reason="the extra cli is not installed")
        from fastapi_prodkit.cli import main

        migrate = containers(TEMPLATES["tasks"])["migrate"]

        assert migrate["Image"] == containers(TEMPLATES["service"])["service"]["Image"] == {"Ref": "Image"}
        assert migrate["Command"] == ["fastapi-prodkit", "db", "upgrade"]
        assert main([*migrate["Command"][1:], "--help"]) == 0

    def test_certificates_of_rds_are_at_their_path(self, variables):
        """In the image, and in the task of the roles."""
        dockerfile = (FOLDER / "image" / "Dockerfile").read_text()

        bundle = re.search(
            r"^ADD --chmod=0444 https://truststore\.pki\.rds\.amazonaws\.com/\S+ (\S+)$", dockerfile, re.MULTILINE
        )[1]
        script = re.search(r"^COPY --chmod=0444 roles\.py (\S+)$", dockerfile, re.MULTILINE)[1]

        named = {variables["service"]["DATABASE_SSL_ROOT_CERT"], variables["roles"]["PGSSLROOTCERT"]}
        assert named == {bundle}
        assert containers(TEMPLATES["tasks"])["roles"]["Command"] == ["python", script]


class TestNumbers:
    def test_stop_timeout_exceeds_drain_and_grace(self):
        """By ten seconds; the library does not warn."""
        stop = containers(TEMPLATES["service"])["service"]["StopTimeout"]

        assert stop >= seconds("SHUTDOWN_DRAIN") + seconds("SHUTDOWN_GRACE") + 10
        assert seconds("SHUTDOWN_DRAIN") + seconds("SHUTDOWN_GRACE") <= 30
        assert stop <= 120, "Fargate allows no more"

    def test_load_balancer_detects_the_drain_in_time(self):
        """Interval times threshold is at most the drain."""
        (targets,) = of_type(TEMPLATES["service"], "AWS::ElasticLoadBalancingV2::TargetGroup").values()

        notices = targets["HealthCheckIntervalSeconds"] * targets["UnhealthyThresholdCount"]

        assert notices <= seconds("SHUTDOWN_DRAIN")
        assert HealthSettings().timeout < targets["HealthCheckTimeoutSeconds"] < targets["HealthCheckIntervalSeconds"]
        assert (targets["HealthCheckPath"], targets["Matcher"]) == ("/ready", {"HttpCode": "200"})

    @pytest.mark.parametrize(
        ("shown", "number"),
        [
            ("`SHUTDOWN_DRAIN` {} s", r"SHUTDOWN_DRAIN, Value: \"(\d+)\""),
            ("`SHUTDOWN_GRACE` {} s", r"SHUTDOWN_GRACE, Value: \"(\d+)\""),
            ("`StopTimeout` {} s", r"StopTimeout: (\d+)"),
            ("deregistration delay {} s", r"deregistration_delay\.timeout_seconds, Value: \"(\d+)\""),
            ("idle time-out {} s", r"idle_timeout\.timeout_seconds, Value: \"(\d+)\""),
            ("health check: {} s of 5 s", r"HealthCheckTimeoutSeconds: (\d+)"),
            ("`BakeTimeInMinutes` {}", r"BakeTimeInMinutes: (\d+)"),
        ],
    )
    def test_page_has_the_numbers_of_the_template(self, shown, number):
        """The table on the ECS page shows the time-outs and the bake time that service.yaml sets."""
        value = re.search(number, (FOLDER / "service.yaml").read_text())[1]

        assert f"| {shown.format(value)} | service.yaml |" in PAGE.read_text()

    def test_deregistration_delay_covers_the_longest_request(self):
        """And the drain."""
        (targets,) = of_type(TEMPLATES["service"], "AWS::ElasticLoadBalancingV2::TargetGroup").values()
        attributes = {each["Key"]: each["Value"] for each in targets["TargetGroupAttributes"]}

        delay = float(attributes["deregistration_delay.timeout_seconds"])

        assert delay > LimitsSettings().request_timeout
        assert delay > seconds("SHUTDOWN_DRAIN")
        assert seconds("SHUTDOWN_GRACE") >= ShutdownSettings().grace

    def test_the_load_balancer_closes_idle_connections_first(self):
        """Otherwise some requests would be a 502."""
        pytest.importorskip("typer", reason="the extra cli is not installed")
        from fastapi_prodkit.cli.serve import KEEP_ALIVE

        (balancer,) = of_type(TEMPLATES["service"], "AWS::ElasticLoadBalancingV2::LoadBalancer").values()
        attributes = {each["Key"]: each["Value"] for each in balancer["LoadBalancerAttributes"]}

        assert float(attributes["idle_timeout.timeout_seconds"]) < KEEP_ALIVE

    def test_database_allows_connections_of_old_and_new_tasks(self):
        """Pools x workers x tasks, twice during a deployment, and ten for RDS and migrations."""
        (service,) = of_type(TEMPLATES["service"], "AWS::ECS::Service").values()
        factor = service["DeploymentConfiguration"]["MaximumPercent"] / 100
        tasks = default(TEMPLATES["service"], "MaxTasks") * factor
        pool = seconds("DATABASE_POOL_SIZE") + seconds("DATABASE_MAX_OVERFLOW")

        wanted = pool * seconds("WEB_CONCURRENCY") * tasks + 10

        (parameters,) = of_type(TEMPLATES["data"], "AWS::RDS::DBParameterGroup").values()
        assert wanted <= default(TEMPLATES["data"], "MaxConnections")
        assert parameters["Parameters"]["max_connections"] == {"Ref": "MaxConnections"}


class TestData:
    def test_database_requires_tls_and_tokens(self):
        """RDS generates the owner's password."""
        (parameters,) = of_type(TEMPLATES["data"], "AWS::RDS::DBParameterGroup").values()
        (database,) = of_type(TEMPLATES["data"], "AWS::RDS::DBInstance").values()

        assert parameters["Parameters"]["rds.force_ssl"] == "1"
        assert database["EnableIAMDatabaseAuthentication"] is database["ManageMasterUserPassword"] is True
        assert database["StorageEncrypted"] is database["DeletionProtection"] is True
        assert database["PubliclyAccessible"] is False
        assert TEMPLATES["data"]["Resources"]["Database"]["DeletionPolicy"] == "Snapshot"

    def test_cache_url_is_a_valid_setting(self):
        """TLS, a token without escapes, and the port of the security groups."""
        resources = TEMPLATES["data"]["Resources"]

        url = resources["CacheUrl"]["Properties"]["SecretString"]["Fn::Sub"]

        assert (
            re.sub(r"\{\{.*?\}\}", "token", url).replace("${Cache.PrimaryEndPoint.Address}", "cache.example")
            == SECRETS["RATE_LIMIT_STORAGE_URL"]
        )
        assert resources["CacheToken"]["Properties"]["GenerateSecretString"]["ExcludePunctuation"] is True
        assert resources["Cache"]["Properties"]["TransitEncryptionEnabled"] is True

    @pytest.mark.parametrize(
        ("name", "metric", "statistic"),
        [
            ("CacheBusy", "CPUUtilization", "Average"),
            ("CacheEngineBusy", "EngineCPUUtilization", "Average"),
            ("CacheFull", "DatabaseMemoryUsagePercentage", "Maximum"),
            ("CacheEvicts", "Evictions", "Sum"),
        ],
    )
    def test_alarm_watches_both_nodes_of_the_cache(self, name, metric, statistic):
        """A fail-over makes the replica the primary."""
        (cache,) = of_type(TEMPLATES["data"], "AWS::ElastiCache::ReplicationGroup").values()
        worse, *nodes = of_type(TEMPLATES["data"], "AWS::CloudWatch::Alarm")[name]["Metrics"]

        watched = [node["MetricStat"]["Metric"] for node in nodes]

        assert worse["Expression"] == f"MAX([{', '.join(node['Id'] for node in nodes)}])"
        assert {node["MetricStat"]["Stat"] for node in nodes} == {statistic}
        assert {(each["Namespace"], each["MetricName"]) for each in watched} == {("AWS/ElastiCache", metric)}
        assert [each["Dimensions"] for each in watched] == [
            [
                {"Name": "CacheClusterId", "Value": {"Fn::Sub": f"${{Cache}}-{number:03}"}},
                {"Name": "CacheNodeId", "Value": "0001"},
            ]
            for number in range(1, cache["NumCacheClusters"] + 1)
        ]

    def test_page_lists_every_alarm_with_its_threshold(self):
        """And the remedy."""
        section = PAGE.read_text().partition("## Other alarms")[2].partition("\n## ")[0]
        alarms = of_type(TEMPLATES["data"], "AWS::CloudWatch::Alarm")

        rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \| .+ \|$", section, re.MULTILINE))

        assert rows.keys() == alarms.keys()
        for name, alarm in alarms.items():
            threshold = alarm["Threshold"]
            assert ("less than 4 GiB" if threshold == 4 * 2**30 else f"above {threshold} ") in rows[name]

    def test_security_groups_allow_only_the_tasks(self):
        """To database and cache; to the tasks only the load balancer."""
        ingress = of_type(TEMPLATES["network"], "AWS::EC2::SecurityGroupIngress").values()
        groups = of_type(TEMPLATES["network"], "AWS::EC2::SecurityGroup")

        heard = {(rule["GroupId"]["Ref"], rule["SourceSecurityGroupId"]["Ref"]) for rule in ingress}

        assert heard == {
            ("ServiceGroup", "LoadBalancerGroup"),
            ("DatabaseGroup", "ServiceGroup"),
            ("CacheGroup", "ServiceGroup"),
        }
        assert [name for name, group in groups.items() if "SecurityGroupIngress" in group] == ["LoadBalancerGroup"]


class TestExpress:
    def test_settings_accept_the_variables_of_the_container(self, stacks, environment):
        """As those of production, without warnings."""
        client = stacks[0].client
        held = {
            "DATABASE_URL": "postgresql://app:pw@db.example/app",
            "RATE_LIMIT_STORAGE_URL": "rediss://cache.example/0",
        }
        secret = client("secretsmanager").create_secret(Name="express", SecretString=json.dumps(held))["ARN"]
        given = {"Image": IMAGE, "Hosts": DOMAIN, "Subnets": "s-1,s-2", "Networks": "172.31.0.0/20", "Secret": secret}
        Account(client, "express").create("express", **given)
        task = client("ecs").describe_task_definition(taskDefinition="express")["taskDefinition"]
        environment({each["name"]: each["value"] for each in task["containerDefinitions"][0]["environment"]})

        settings = Settings()

        assert settings.database.url.get_secret_value() == held["DATABASE_URL"]
        assert settings.rate_limit.shared
        assert settings.proxy.trusted == ("172.31.0.0/20",)

    def test_express_task_drains_like_the_service(self):
        """With the same probe, and the container name that Express Mode requires."""
        (express,) = of_type(TEMPLATES["express"], "AWS::ECS::ExpressGatewayService").values()
        main, service = containers(TEMPLATES["express"])["Main"], containers(TEMPLATES["service"])["service"]

        same = [each for each in main["Environment"] if each["Name"].startswith(("SHUTDOWN_", "ENVIRONMENT", "WEB_"))]

        assert all(each in service["Environment"] for each in same)
        assert len(same) == 4
        assert main["StopTimeout"] == service["StopTimeout"]
        assert main["PortMappings"][0]["ContainerPort"] == 8000
        assert express["HealthCheckPath"] == "/ready"


class TestRollback:
    def test_failed_release_is_rolled_back(self):
        """By the circuit breaker and by alarms; old tasks run until new ones are ready."""
        (service,) = of_type(TEMPLATES["service"], "AWS::ECS::Service").values()

        deployment = service["DeploymentConfiguration"]

        assert deployment["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
        assert deployment["Alarms"]["Enable"] is deployment["Alarms"]["Rollback"] is True
        assert {each["Ref"] for each in deployment["Alarms"]["AlarmNames"]} == {"ServerErrors", "NoTarget", "Slow"}
        assert deployment["MinimumHealthyPercent"] == 100

    def test_alarms_fire_within_the_bake_time(self):
        """Every alarm that can roll back a deployment fires before the bake time ends."""
        (service,) = of_type(TEMPLATES["service"], "AWS::ECS::Service").values()
        alarms = of_type(TEMPLATES["service"], "AWS::CloudWatch::Alarm")
        deployment = service["DeploymentConfiguration"]

        minutes = [alarms[each["Ref"]]["EvaluationPeriods"] for each in deployment["Alarms"]["AlarmNames"]]

        assert max(minutes) + 1 < deployment["BakeTimeInMinutes"]

    def test_service_sets_no_number_of_tasks(self):
        """Auto scaling sets it."""
        (service,) = of_type(TEMPLATES["service"], "AWS::ECS::Service").values()
        (scaling,) = of_type(TEMPLATES["service"], "AWS::ApplicationAutoScaling::ScalableTarget").values()

        assert "DesiredCount" not in service
        assert (scaling["MinCapacity"], scaling["MaxCapacity"]) == ({"Ref": "MinTasks"}, {"Ref": "MaxTasks"})

    def test_every_alarm_has_an_action(self):
        """Every CloudWatch alarm has an action and a description, and each required metric has an alarm."""
        alarms = {
            name: alarm
            for each in TEMPLATES.values()
            for name, alarm in of_type(each, "AWS::CloudWatch::Alarm").items()
        }

        metrics = {metric for alarm in alarms.values() for metric in re.findall(r"'MetricName': '(\w+)'", str(alarm))}

        assert all(alarm["AlarmActions"] and alarm["AlarmDescription"] for alarm in alarms.values())
        assert metrics >= {
            "HTTPCode_Target_5XX_Count",
            "HTTPCode_ELB_5XX_Count",
            "TargetResponseTime",
            "UnHealthyHostCount",
            "HealthyHostCount",
            "CPUUtilization",
            "MemoryUtilization",
            "FreeStorageSpace",
            "DatabaseConnections",
            "EngineCPUUtilization",
            "DatabaseMemoryUsagePercentage",
            "Evictions",
        }
