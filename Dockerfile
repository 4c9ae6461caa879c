# The image: the program, the libraries that it links, and the bundle of certificate authorities. No shell, no package manager, no root.
#
#   docker build -t tidegate .
#
# On a machine whose builds have no network, from a binary that was built outside (for Debian 13's C library or an older one):
#
#   docker build -t tidegate --build-arg BINARY=given --build-context given=target/release .

# build: compiled here. given: taken from the build context `given`.
ARG BINARY=build
ARG RUST_VERSION=1.95

FROM rust:${RUST_VERSION}-slim-trixie AS binary-build
# The list of crates is put into the binary, so that scanners find it in the image.
RUN cargo install --locked --version 0.7.7 cargo-auditable
WORKDIR /tidegate
# The dependencies first, with an empty program: this layer is rebuilt only when a manifest changes.
COPY Cargo.toml Cargo.lock ./
COPY lab/Cargo.toml lab/
RUN mkdir -p src lab/src benches tests/it \
    && echo 'fn main() {}' | tee src/main.rs lab/src/main.rs benches/steps.rs tests/it/main.rs > build.rs \
    && touch src/lib.rs lab/src/lib.rs \
    && cargo auditable build --release --locked --bin tidegate
COPY build.rs ./
COPY migrations migrations
COPY docs/runbooks docs/runbooks
COPY src src
# Cargo compares times, and files of a checkout may be older than the empty ones.
RUN touch build.rs src/main.rs src/lib.rs \
    && cargo auditable build --release --locked --bin tidegate \
    && mkdir /binary && cp target/release/tidegate /binary/

FROM scratch AS binary-given
COPY --from=given tidegate /binary/

FROM binary-${BINARY} AS binary

FROM debian:trixie-slim AS root
RUN test -s /etc/ssl/certs/ca-certificates.crt \
    || { apt-get update && apt-get install --yes --no-install-recommends ca-certificates; }
COPY --from=binary /binary/tidegate /root-of-image/usr/bin/tidegate
# The libraries go where the program looks for them: ldd names them and the loader.
RUN set -e; cd /root-of-image; \
    chmod 0755 usr/bin/tidegate; \
    for library in $(ldd usr/bin/tidegate | grep -o '/[^ ]*'); do install -D -m 0755 "$library" ".$library"; done; \
    install -D -m 0644 /etc/ssl/certs/ca-certificates.crt etc/ssl/certs/ca-certificates.crt; \
    echo 'tidegate:x:65532:65532:Tidegate:/:/sbin/nologin' > etc/passwd; \
    echo 'tidegate:x:65532:' > etc/group; \
    echo 'hosts: files dns' > etc/nsswitch.conf; \
    chroot . /usr/bin/tidegate --version

FROM scratch
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="tidegate" \
      org.opencontainers.image.description="Write-behind for Valkey and PostgreSQL: every delta lands exactly once, whatever crashes" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
COPY --from=root /root-of-image/ /
COPY LICENSE-APACHE LICENSE-MIT /usr/share/licenses/tidegate/
# A container's own loopback is reached by nobody else: neither probes nor Prometheus.
ENV TIDEGATE__ADMIN__LISTEN=0.0.0.0:9464
USER 65532:65532
EXPOSE 9464
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s --retries=3 CMD ["/usr/bin/tidegate", "health"]
ENTRYPOINT ["/usr/bin/tidegate"]
CMD ["run"]
