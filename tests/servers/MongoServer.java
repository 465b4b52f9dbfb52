import de.bwaldvogel.mongo.MongoServer;
import de.bwaldvogel.mongo.MongoVersion;
import de.bwaldvogel.mongo.backend.memory.MemoryBackend;
import java.util.List;

/**
 * mongo-java-server in memory, with its oplog. Its change streams return no resume token, which current drivers require. The
 * only argument is the port on 127.0.0.1.
 */
class Main {
    /** The wire version that current drivers require; the server's own versions report the one of MongoDB 4.2. */
    record Version(List<Integer> getVersionArray, int getWireVersion) implements MongoVersion {}

    public static void main(String[] arguments) throws InterruptedException {
        MongoServer server = new MongoServer(new MemoryBackend().version(new Version(List.of(5, 0, 0), 13)));
        server.enableOplog();
        server.bind("127.0.0.1", Integer.parseInt(arguments[0]));
        Thread.currentThread().join();
    }
}
