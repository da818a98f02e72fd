# One image for server and workers: `docker build -t sanderling .`
FROM rust:1-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked

FROM debian:bookworm-slim
# An unprivileged user; /data takes the results, /join the join string that the server hands to the workers. A volume
# mounted there for the first time takes over their owner.
RUN useradd --uid 10001 --create-home sanderling \
    && mkdir -p /data /join && chown sanderling: /data /join
COPY --from=build /src/target/release/sanderling /src/target/release/sanderling-server \
    /src/target/release/sanderling-worker /usr/local/bin/
USER sanderling
WORKDIR /data
EXPOSE 4433/udp
CMD ["sanderling-server", "--listen", "0.0.0.0:4433"]
