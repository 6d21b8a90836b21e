"""Pages of other packages in a real browser, under the presets."""

import pytest
from browser import needs_browser, other_hosts, visit
from fastapi import FastAPI
from wire import serving

from fastapi_prodkit import Settings, create_app, install
from fastapi_prodkit.security_headers import GRAPHIQL_CSP, SQLADMIN_CSP

POLICIES = {"/admin": SQLADMIN_CSP, "/graphql": GRAPHIQL_CSP}


def created(policies):
    return create_app(Settings(environment="dev"), csp_policies=policies)


def installed(policies):
    app = FastAPI()
    install(app, Settings(environment="dev"), csp_policies=policies)
    return app


def violations(page):
    return [complaint for complaint in page.complaints if "Content Security Policy" in complaint]


def add_sqladmin(app) -> None:
    sqladmin = pytest.importorskip("sqladmin")
    orm = pytest.importorskip("sqlalchemy.orm")
    sqlalchemy = pytest.importorskip("sqlalchemy")

    class Base(orm.DeclarativeBase): ...

    class User(Base):
        __tablename__ = "users"
        id = sqlalchemy.Column(sqlalchemy.Integer, primary_key=True)
        name = sqlalchemy.Column(sqlalchemy.String)
        since = sqlalchemy.Column(sqlalchemy.DateTime)

    class UserAdmin(sqladmin.ModelView, model=User):
        column_list = "__all__"
        column_searchable_list = ("name",)

    in_memory = {"connect_args": {"check_same_thread": False}, "poolclass": sqlalchemy.StaticPool}
    engine = sqlalchemy.create_engine("sqlite://", **in_memory)
    Base.metadata.create_all(engine)
    with orm.Session(engine) as session:
        session.add(User(name="Ada"))
        session.commit()
    sqladmin.Admin(app, engine).add_view(UserAdmin)


@needs_browser
@pytest.mark.parametrize("make", [created, installed])
def test_sqladmin_works_under_its_preset(make):
    """Its scripts run, and load nothing from other hosts."""
    app = make(POLICIES)
    add_sqladmin(app)

    with serving(app) as port:
        listed, edited = (visit(f"http://127.0.0.1:{port}/admin/user/{path}") for path in ("list", "edit/1"))

    assert "Ada" in listed.dom
    assert "flatpickr-calendar" in edited.dom
    assert listed.complaints == edited.complaints == []


@needs_browser
def test_sqladmin_under_the_general_policy_logs_a_warning(caplog):
    """Under the general policy, SQLAdmin's scripts and styles are blocked, and one warning names the route."""
    app = created({})
    add_sqladmin(app)

    with serving(app) as port:
        edited = visit(f"http://127.0.0.1:{port}/admin/user/edit/1")

    assert violations(edited)
    assert "flatpickr-calendar" not in edited.dom
    assert [record.args for record in caplog.records if record.name == "fastapi_prodkit.security_headers"] == [
        ("/admin/{identity}/edit/{pk}", "scripts and no styles")
    ]


@needs_browser
@pytest.mark.parametrize("make", [created, installed])
def test_graphiql_is_not_blocked_by_its_preset(make):
    """Its scripts are on a host that this test cannot reach."""
    strawberry = pytest.importorskip("strawberry")
    router = pytest.importorskip("strawberry.fastapi").GraphQLRouter
    query = strawberry.type(type("Query", (), {"__annotations__": {"name": str}}))
    app = make(POLICIES)
    app.include_router(router(strawberry.Schema(query)), prefix="/graphql")

    with serving(app) as port, other_hosts({}) as flags:
        page = visit(f"http://127.0.0.1:{port}/graphql", *flags)

    assert violations(page) == []
    assert any("Cookies is not defined" in complaint for complaint in page.complaints)  # the inline script has run
