# syntax=docker/dockerfile:1
# The image of one service: docker build --build-arg SERVICE=user .
# SERVICE=console is the image of the live page. SERVICE=credentials is the image of the program that
# makes certificates for compose.secure.yaml.
#
# The first stage builds every folder in services/ and does not use SERVICE, so that the images of
# all services cost one build.

ARG RUST_IMAGE=rust:1.95-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian13:nonroot

FROM ${RUST_IMAGE} AS build
WORKDIR /src
# The SQL queries are checked against the committed .sqlx folders, not against a database.
ENV SQLX_OFFLINE=true
COPY . .
# The cache mounts keep the dependencies compiled. Other checkouts on this machine share them, and
# cargo compares modification times: the compiled code of another checkout may be newer than our
# sources. So our sources are touched and always compiled.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,sharing=locked \
    find . -name '*.rs' -not -path './target/*' -exec touch {} + \
 && cargo build --release --locked $(ls services | sed 's/^/--package /') --package credentials \
      $(ls tools | sed -n 's/^console$/--package waybill-console/p') \
 && mkdir /programs \
 && cd target/release \
 && cp $(ls /src/services) $(ls /src/tools | grep -x -e credentials -e console) /programs/

# Contains a C runtime, certificates and an unprivileged user, but no shell and no tools. Its glibc
# is newer than that of the first stage, as the programs need.
FROM ${RUNTIME_IMAGE}
ARG SERVICE
COPY --from=build /programs/${SERVICE:?missing} /app
USER 65532:65532
ENTRYPOINT ["/app"]
