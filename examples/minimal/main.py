"""A production-ready API in ten lines: `uvicorn main:app`."""

from fastapi_prodkit import create_app

app = create_app()


@app.get("/hello/{name}")
async def hello(name: str) -> dict[str, str]:
    return {"message": f"Hello, {name}"}
