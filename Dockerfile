# syntax=docker/dockerfile:1
# The image of one service: docker build --build-arg SERVICE=user .
# The first stage builds all of them and does not know which one is asked for, so that four images cost one build.

ARG RUST_IMAGE=rust:1.95-bookworm
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian13:nonroot

FROM ${RUST_IMAGE} AS build
WORKDIR /src
# Queries are checked against the committed .sqlx, not against a database.
ENV SQLX_OFFLINE=true
COPY . .
# Dependencies stay compiled in the cache, which other checkouts on this machine share. Cargo goes by the files' times, and
# theirs may be newer than ours: our own code, touched, is always compiled.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,sharing=locked \
    find . -name '*.rs' -not -path './target/*' -exec touch {} + \
 && cargo build --release --locked --workspace --exclude tests --exclude testbed --exclude topology --exclude xtask \
 && mkdir /programs \
 && for service in services/*/; do cp "target/release/$(basename "$service")" /programs/ || exit 1; done

# A C runtime, certificates and a user without rights; no shell and no tools. Its glibc is newer than the builder's.
FROM ${RUNTIME_IMAGE}
ARG SERVICE
COPY --from=build /programs/${SERVICE:?missing} /app
USER 65532:65532
ENTRYPOINT ["/app"]
